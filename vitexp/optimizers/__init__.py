"""Optimizers that torch and timm do not have, or have otherwise than a recipe needs."""
