from __future__ import annotations

from pathlib import Path

import pytest

from vitexp.commands.list import group_named, main, option_file, sentence
from vitexp.config_paths import config_groups
from vitexp.costs import count_parameters
from vitexp.errors import UserError
from vitexp.models.build import build_model


def lines(capsys: pytest.CaptureFixture[str], *arguments: str, config_dir: str | None = None) -> dict[str, str]:
    assert main(list(arguments), config_dir) == 0
    rows = capsys.readouterr().out.splitlines()
    return {row.split()[0]: row[26:] for row in rows if row[0] != " "}


def test_a_sentence_ends_where_a_capital_follows(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text("# @package _global_\n# Of He et al. 2022, at 0.5 of\n# all. More.\n#   a command\na: 1 # b\n")
    assert sentence(file) == "Of He et al. 2022, at 0.5 of all"
    file.write_text("a: 1 # b\n# late\n")
    assert sentence(file) == ""


def test_every_option_says_what_it_is():
    groups = config_groups()
    silent = [
        f"{g}={name}" for g, names in groups.items() for name in names if not sentence(option_file(g, name, None))
    ]
    assert [name for name in silent if not name.startswith(("runtime=", "tracking="))] == []


def test_groups_go_by_singular_and_plural():
    groups = config_groups()
    for words in ("models", "experiments", "optim", "schedules", "data", "augments", "methods", "stages", "pipelines"):
        assert group_named(words, groups) in (words, words[:-1])
    assert group_named("evaluators", groups) == "evaluators"
    with pytest.raises(UserError, match="Did you mean 'models'"):
        group_named("modles", groups)


def test_a_filter_is_a_pattern_of_names_or_a_word(capsys):
    assert list(lines(capsys, "models", "t2t_t_*")) == ["t2t_t_14", "t2t_t_19", "t2t_t_24"]
    assert "vit_tiny_4" in lines(capsys, "model", "cifar")  # in its sentence
    with pytest.raises(UserError, match=r"'vit_bse': no such model\. Did you mean 'vit_base'"):
        main(["models", "vit_bse"], None)


def test_parameters_are_counted_without_values(capsys, tmp_path: Path):
    expected = count_parameters(build_model("vit_micro")) / 1e6
    assert lines(capsys, "models", "vit_micro", "params=true")["vit_micro"].startswith(
        f"{expected:8.2f} M  The default"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text("# Mine.\ndefaults: [vit_micro, _self_]\ndepth: 5\n")
    own = lines(capsys, "models", "own", "params=true", config_dir=str(tmp_path))["own"]
    assert own == f"{count_parameters(build_model('vit_micro', depth=5)) / 1e6:8.2f} M  Mine"


def test_timms_models_go_by_pattern(capsys):
    assert list(lines(capsys, "timm", "resnet1[08]")) == ["resnet18"] or "resnet18" in lines(capsys, "timm", "resnet18")
    with pytest.raises(UserError, match="Did you mean 'resnet18'"):
        main(["timm", "resnet18x"], None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["models", "a", "b"], "list \\[group\\]"),
        (["models", "paras=true"], "params=true or"),
        (["optim", "params=true"], "only"),
    ],
)
def test_what_list_does_not_take_is_named(given: list[str], said: str):
    with pytest.raises(UserError, match=said):
        main(given, None)
