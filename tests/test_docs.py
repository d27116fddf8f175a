"""What README and CONTRIBUTING say is so: commands, options, links, the tree, snippets."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser

from kvquant import cli, preflight
from kvquant.config import register_schemas
from kvquant.report import readme as readme_report
from kvquant.results import SCHEMA

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "paper/README.md", "paper/results.md")]
CONF = cli.conf_dir()
# What a reader fills in.
PLACEHOLDERS = {"<date>": "2026-11-24", "<time>": "10-00-00-000000", "<grant>": "plggrant"}


def fenced(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command line of README's blocks, comments cut off."""
    lines = [
        line.removeprefix("$ ")
        for language, block in fenced(README)
        if language in ("", "bash")
        for line in block.splitlines()
    ]
    found = [re.sub(r"\s{2,}#.*", "", line).strip() for line in lines]
    words = ("python", "pip", "uv", "make", "pytest", "srun", "squeue", "wandb", "hf", "module", "export")
    return [part.strip() for line in found if line.startswith(words) for part in line.split(" && ")]


RUNS = sorted({c for c in commands() if c.startswith(("python src/run.py", "uv run src/run.py"))})
REFUSED = {c for c in RUNS if "quant.bitz" in c or "quant.bits=2,9" in c}


def arguments(command: str) -> list[str]:
    for name, value in PLACEHOLDERS.items():
        command = command.replace(name, value)
    return shlex.split(command.split("src/run.py", 1)[1])


def test_readme_has_commands() -> None:
    assert len(RUNS) > 20 and len(REFUSED) == 2


@pytest.mark.parametrize("command", sorted(set(RUNS) - REFUSED))
def test_every_command_composes_and_passes_every_check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ACCOUNT", "plggrant-gpu-a100")
    # Every point of a sweep is composed and validated, as before a run; only sbatch is taken for granted.
    monkeypatch.setattr(preflight.shutil, "which", lambda name: f"/usr/bin/{name}")
    register_schemas()
    args: argparse.Namespace = get_args_parser().parse_args(arguments(command))
    if not args.help:
        preflight.check_command(args, only_compose=bool(args.cfg))


@pytest.mark.parametrize("command", sorted(REFUSED))
def test_a_slip_is_answered_as_shown(command: str, tmp_path: Path) -> None:
    call = [sys.executable, ROOT / "src" / "run.py", *arguments(command)]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and f"$ {command}\n{done.stderr.strip()}\n" in README
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("args", [["--help"], ["--cfg", "job"]], ids=" ".join)
def test_quick_commands_run(args: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "src" / "run.py", *args], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) > 100
    assert list(tmp_path.iterdir()) == []


NEEDS = (
    "athena",
    "a100",
    "longbench",
    "local",
    "model.path",
    "batch=trace",
    "task=energy",
    "lm_eval",
    "kernels",
    "cuda",
    "long_context",  # half an hour
    "experiment=paper",  # continuous integration runs it
)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(c for c in set(RUNS) - REFUSED if not any(n in c for n in NEEDS)))
def test_every_command_of_a_laptop_runs(command: str, tmp_path: Path) -> None:
    args = arguments(command)
    # As small as it goes, from nothing; presets of the command line are kept.
    presets = [a.partition("=")[2].strip("[]") for a in args if a.startswith("experiment=")]
    if "task=report" in args:
        args = [a for a in args if not a.startswith("report.runs=")] + [
            f"report.runs={ROOT}/paper/data/*.json"
        ]
    if not {"--help", "--cfg"} & set(args):
        args = [a for a in args if not a.startswith("experiment=")]
        args.append(f"experiment=[{','.join([*presets, 'smoke']) if 'smoke' not in presets else 'smoke'}]")
    done = subprocess.run(
        [sys.executable, ROOT / "src" / "run.py", *args], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_that_is_run_exists(page: Path) -> None:
    for name in re.findall(r"python -m (kvquant[\w.]*)", page.read_text()):
        assert importlib.util.find_spec(name), name


def test_makefile_has_every_target_that_is_named() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = README + (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "paper" / "README.md").read_text()
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for target in targets - {"clean", "install", "ci"}:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def groups() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(CONF.rglob("*.yaml")):
        if path.parent != CONF:
            found.setdefault(path.parent.relative_to(CONF).as_posix(), []).append(path.stem)
    return found


@pytest.mark.parametrize("group", sorted(groups()))
def test_readme_names_every_option_and_no_other(group: str) -> None:
    (row,) = re.findall(rf"^\| `{re.escape(group)}` \| (.*?) \|", README, re.MULTILINE)
    named = re.findall(r"`([^`]+)`", row)
    # Hydra's own launcher has no file.
    assert sorted(set(named) - {"basic"}) == sorted(groups()[group])


def test_help_says_what_every_group_and_option_is_for_and_fits_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = cli.help_text()
    assert set(cli.GROUPS) == set(groups())
    for group, options in groups().items():
        head, *block = text.split(f"\n{group}=", 1)[1].split("\n\n")[0].splitlines()
        assert len(head.strip()) > 10, f"{group} is not described"
        for option in options:
            (line,) = [line for line in block if re.match(rf"  {option} ", line)]
            assert len(line.split(None, 1)[1]) > 15, f"{group}={option} is not described"
    assert max(map(len, text.splitlines())) <= 100


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    heads = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else page.parent / path
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text()), target


def test_the_tree_is_the_tree() -> None:
    (block,) = [b for _, b in fenced(README) if "src/run.py   " in b and "  errors.py" in b]
    inside, named = False, set()
    for line in block.splitlines():
        names = line.split("  ")[0].split() if not line.startswith("  ") else line.split()[:1]
        if line.startswith("src/kvquant/"):
            inside = True
            continue
        inside = inside and line.startswith("  ")
        for name in names:
            assert not inside or name.rstrip("/") not in named, f"{name} stands in the tree twice"
            path = ROOT / ("src/kvquant" if inside else "") / name
            assert path.exists() or name in ("outputs/", "multirun/"), name
            if inside:
                named.add(name.rstrip("/"))
        assert len(line.split(None, len(names))) > len(names), f"{line} says nothing"
    package = ROOT / "src" / "kvquant"
    there = {p.name for p in package.iterdir() if p.name not in ("__init__.py", "__pycache__")}
    assert named == there


def test_the_library_snippet_runs() -> None:
    import torch

    from kvquant.batched_quant import BatchedKVQuantizer
    from kvquant.spec import QuantSpec

    (snippet,) = [b for lang, b in fenced(README) if lang == "python" and "BatchedKVQuantizer.calibrate" in b]
    lines = snippet.split("with quantized_kv_cache", 1)[0]
    keys, values = torch.randn(2, 96, 2, 64)
    names: dict[str, Any] = {
        "QuantSpec": QuantSpec,
        "BatchedKVQuantizer": BatchedKVQuantizer,
        "keys": keys,
        "values": values,
        "cu_seqlens": torch.tensor([0, 40, 96], dtype=torch.int32),
    }
    exec(lines, names)
    assert names["keys_hat"].shape == keys.shape and names["packed"].effective_bits > 3


def kept(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "status": "ok",
        "task": "compare",
        "config": {"quant": {"bits": 3}, "task": {}},
        "config_hash": "0",
        "provenance": {
            "overrides": [f"experiment={name}"],
            "device": "a CPU",
            "git_sha": "f" * 40,
            "model_hash": None,
            "git_dirty": True,
        },
        "metrics": {"variants": {}},
        "table": {
            "title": name,
            "columns": ["", "bits", "p (Holm)"],
            "rows": [["nuq3-1%", "3.60", "-"], ["odd", "1", "-"]],
        },
        "figures": ["quality.png"],
        "error": None,
        **changes,
    }


def test_results_pages_are_made_of_what_is_kept(tmp_path: Path) -> None:
    import json

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{readme_report.BEGIN}\nold\n{readme_report.END}\nafter\n")
    for name in ("main_table", "pareto"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps(kept(name)))
        (run / "quality.png").write_bytes(b"png")
    readme_report.main([str(tmp_path / "runs" / "main_table")], tmp_path)
    readme_report.main([str(tmp_path / "runs" / "pareto")], tmp_path)
    text, page = readme.read_text(), (tmp_path / "paper" / "results.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| nuq3-1% | 3.60 |" in text and "odd" not in text and "code ffffffffff+" in text
    assert "paper/figures/main_table_quality.png" in text
    assert "## main_table" in page and "## pareto" in page and "| odd | 1 | - |" in page
    (tmp_path / "runs" / "pareto" / "result.json").write_text(json.dumps(kept("pareto", status="failed")))
    with pytest.raises(ValueError, match="runs must have status ok"):
        readme_report.main([str(tmp_path / "runs")], tmp_path)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "pareto"),
        ({"provenance": {"overrides": ["experiment=ablation_allocation"], "device": "a CPU"}}, "allocation"),
        ({"provenance": {"overrides": ["paper=quantize"], "device": "a CPU"}}, "quantize"),
        (
            {
                "provenance": {
                    "overrides": ["data.calibration_tokens=2048", "experiment=pareto"],
                    "device": "a CPU",
                }
            },
            "pareto_2048",
        ),
        ({"task": "perplexity", "provenance": {"overrides": []}}, "perplexity_3bit"),
        ({"task": "kernels", "provenance": {"device": "NVIDIA H100 80GB HBM3"}}, "kernels_h100"),
        (
            {
                "task": "kernels",
                "config": {"task": {"shapes": ["llama2_7b", "qwen3_8b"], "tokens": [32768, 1024, 8192]}},
                "provenance": {"device": "NVIDIA H200"},
            },
            "kernels_llama2_7b_qwen3_8b_1k_32k_h200",
        ),
        (
            {
                "task": "energy",
                "config": {"task": {"phases": ["decode"]}},
                "provenance": {"device": "NVIDIA A100-SXM4-40GB"},
            },
            "energy_decode_a100",
        ),
        (
            {
                "task": "energy",
                "config": {"task": {"phases": ["decode"], "prompt_tokens": [8192]}},
                "provenance": {"device": "NVIDIA H200"},
            },
            "energy_decode_8k_h200",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_is_kept_under_a_name_that_lasts(changes: dict[str, Any], name: str) -> None:
    assert readme_report.name_of(kept("pareto", **changes)) == name
