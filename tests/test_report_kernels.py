"""What README and the paper say of kernels on a GPU: by case and width, from all parts of a bench, good or bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvquant.report.collect import Run, collect
from kvquant.report.kernel_cases import SPEEDUP, cases_of, us_of_way, us_per_1k_tokens, values
from kvquant.report.kernels_figure import draw_decode
from kvquant.report.paper.build import write_paper
from kvquant.report.paper.sources import kernel_rows, largest_part_first
from kvquant.report.readme_kernels import draw_kept_decode, gpu_name, kernel_parts

PAPER = Path(__file__).resolve().parent.parent / "paper"
MAIN = "kernels_llama31_8b_1k_32k_h200"


def kept_kernels() -> dict[str, Any]:
    paths = [*(PAPER / "data").glob("kernels_*_h200.json"), PAPER / "data" / "largest_batch_h200.json"]
    return {path.stem: json.loads(path.read_text()) for path in paths}


def row(operation: str, batch: int, tokens: int, bits: int, **more: Any) -> dict[str, Any]:
    case = {"shape": "s", "batch": batch, "tokens": tokens, "mean_tokens": float(tokens), "is_trace": False}
    return {"operation": operation, "bits": bits, "label": f"{batch}x{tokens}", **case, **more}


def parts_of(kept: dict[str, Any], paper: Path = PAPER) -> str:
    def as_table(columns: Any, rows: Any) -> str:
        return "\n".join(" | ".join(cells) for cells in [columns, *rows])

    return "\n".join(kernel_parts(kept, paper, as_table))


def bench(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    provenance = {"device": "NVIDIA A100-SXM4-40GB", "git_sha": "c" * 40}
    metrics = {"rows": list(rows), "copy_gb_per_s": 1500.0}
    result = {
        "task": "kernels",
        "status": "ok",
        "started_at": "2026-01-01T00:00:00+00:00",
        "metrics": metrics,
    }
    return {**result, "config": {"task": {}}, "provenance": provenance, **changes}


def attention(batch: int, tokens: int, bits: int, speedup: float, **more: Any) -> dict[str, Any]:
    times = {"us": 100 / speedup, "low_us": 99 / speedup, "high_us": 101 / speedup}
    rival = {"full_precision_way": "sdpa_cudnn", "full_precision_us": 100.0, SPEEDUP: speedup}
    return row("decode", batch, tokens, bits, copy_fraction=0.25, **times, **rival, **more)


def test_cases_stand_by_shape_and_length_with_their_widths_side_by_side() -> None:
    ragged = attention(32, 900, 4, 3.0, is_trace=True, mean_tokens=250.4, label="trace32")
    rows = [attention(8, 2048, 3, 1.5), ragged, attention(8, 2048, 4, 1.25), row("prefill", 8, 2048, 4)]
    uniform, last = cases_of(rows, "decode")
    assert (uniform.words(), last.words()) == ("8 x 2,048", "32 of 250 on average")
    assert uniform.total_tokens == 16384 and last.total_tokens == 8013
    # In the order of widths, what was not measured left out.
    assert values([uniform], SPEEDUP) == [1.25, 1.5] and values([last], SPEEDUP) == [3.0]
    assert us_per_1k_tokens({"us": 40.0, "tokens": 8192}) == 5.0 and us_per_1k_tokens({"tokens": 1}) is None
    timed = {"operation": "decode", "shape": "s", "label": "8x2048", "way": "varlen"}
    assert us_of_way([{**timed, "us": 7.0}], uniform, "decode", "varlen") == 7.0
    assert us_of_way([{**timed, "refused": "no"}], uniform, "decode", "varlen") is None
    assert us_of_way([], uniform, "decode", "flex") is None


def test_readme_says_where_decode_wins_and_where_not() -> None:
    text = parts_of(kept_kernels())
    for said in (
        "Kernels on an NVIDIA H200 (code 50f3917d04;",
        "llama31_8b, 8 x 32,768 | 243 (cudnn) | 163 (1.45, 1.48; 41%) | 164 (1.44, 1.47; 32%) | 149 (1.59, 1.62; 25%)",
        "llama31_8b, 32 of 8,171 on average | 845 (cudnn) | 174 (4.73, 4.86; 39%)",
        "49 (0.78, 0.79; 13%)",
        "llama31_8b, 1 x 131,072 | 348,494 | 5.2 (0.19%)",
        "speed: 1.44 to 1.83 for eight or more sequences of 32K tokens",
        "0.47 to 1.35 for one sequence",
        "is met by llama2_7b, 8 x 32,768 (at 4, 3 and 2 bits); llama31_8b, 8 x 32,768 (at 2 bits); llama31_8b, 64 x 32,768 "
        "(at 4, 3 and 2 bits); qwen3_8b, 8 x 32,768 (at 2 bits); and by no other",
        "In graphs it is 1.46 to 1.84 there, and met by llama2_7b",
        "4.73, 4.78 and 5.22 times as fast at 4, 3 and 2 bits. What it gains is the padding",
        "for 262,144 of equal lengths (8 x 32,768) full precision takes 845 and 243 us",
        "but for llama2_7b, 1 x 32,768 (1.27 to 1.91%) and llama31_8b, 1 x 1,024 (3.13 to 3.41%)",
        "0.93 to 0.97 for 1, 0.45 to 0.81 for 8, 0.19 to 0.48 for 64",
        "0.81 to 0.82 of flex attention's, which was not tried everywhere, and 0.95 to 0.96 of Flash",
        "holds 55 prompts of 16,384 tokens exactly",
        "200 (3.6 times) at 4 bits, 257 (4.7 times) at 3 bits, 362 (6.6 times) at 2 bits",
        "paper/figures/kernels_h200_decode.png",
    ):
        assert said in text, said


def test_readme_claims_nothing_that_its_runs_do_not_say(tmp_path: Path) -> None:
    assert parts_of({}) == "" and gpu_name(bench()) == "a100"
    # Fast enough and near a copy: no excuse; a GPU alone counts; no figure where none was drawn.
    fast = bench(*(attention(8, 32768, bits, 1.6) | {"copy_fraction": 0.7} for bits in (4, 3, 2)))
    text = parts_of({"kernels": fast}, tmp_path)
    assert "1.60 for eight or more" in text and "instructions" not in text
    assert (
        "is met by s, 8 x 32,768 (at 4, 3 and 2 bits); and by" in text and "~" not in text.split("Decode")[1]
    )
    # Ratios of graphs, where they were measured, stand beside those of calls.
    graphs = bench(
        *(attention(8, 32768, bits, 1.4, graph_us=60.0, full_precision_graph_us=93.0) for bits in (4, 3, 2)),
        # In a graph full precision took longer than alone.
        *(
            attention(64, 32768, bits, 1.4, graph_us=80.0, full_precision_graph_us=200.0)
            for bits in (4, 3, 2)
        ),
    )
    text = parts_of({"kernels": graphs}, tmp_path)
    assert (
        "60 (1.40, 1.55; 25%)" in text
        and "call by call and then in graphs, of full precision the faster of the two (" in text
    )
    assert "80 (1.40, 1.25; 25%)" in text
    assert "In graphs it is 1.25 to 1.55 there, and met by s, 8 x 32,768 (at 4, 3 and 2 bits)" in text
    # Calls that differ much are shown, and nothing is said of them.
    slow = bench(attention(8, 32768, 4, 0.9), attention(8, 32768, 3, 0.1) | {"high_us": 1e4, "low_us": 1.0})
    text = parts_of({"kernels": slow}, tmp_path)
    assert "(~0.10;" in text and "marked ~: 0.90 for eight or more" in text and "met at no width" in text
    blurred = bench(
        attention(8, 32768, 4, 1.6) | {"high_us": 1e4, "low_us": 1.0}, attention(8, 32768, 3, 1.4)
    )
    assert "met at no width" in parts_of({"kernels": blurred}, tmp_path)
    assert (
        "png" not in text and "ragged" not in text and "Quantizing" not in text and "prompts of" not in text
    )
    assert parts_of({"kernels": fast | {"provenance": {"device": "a CPU"}}}) == ""
    # A ragged batch without a uniform one of its size is not explained by padding.
    lengths = {"is_trace": True, "mean_tokens": 250.0, "label": "trace32"}
    ragged = bench(*(attention(32, 900, bits, 3.0, **lengths) for bits in (4, 3, 2)))
    text = parts_of({"kernels": ragged}, tmp_path)
    assert "3.00, 3.00 and 3.00 times" in text and "padding" not in text
    share = row("layer_share", 1, 1024, 4, us=5.0, layer_us=1000.0, percent_of_layer=0.5)
    assert "which was the aim." in parts_of({"kernels": bench(share)}, tmp_path)


def test_decode_is_drawn_from_all_parts_where_there_are_any(tmp_path: Path) -> None:
    draw_kept_decode({}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    draw_kept_decode({"a": bench(attention(8, 2048, 4, 1.5))}, tmp_path)
    assert (tmp_path / "kernels_a100_decode.png").read_bytes()[:4] == b"\x89PNG"
    # A width alone, and a row without a rival.
    rows = [attention(8, 2048, 3, 1.5), row("decode", 1, 2048, 3)]
    assert draw_decode(rows, tmp_path / "decode.pdf", 3.25).read_bytes()[:4] == b"%PDF"


def test_the_part_with_most_rows_comes_first(tmp_path: Path) -> None:
    few = bench(attention(1, 1024, 4, 0.5), started_at="2026-02-01T00:00:00+00:00")
    many = bench(attention(8, 2048, 4, 1.5), attention(8, 2048, 3, 1.5))
    runs = [Run(tmp_path / "few", few), Run(tmp_path / "many", many)]
    assert [run.folder.name for run in largest_part_first(kernel_rows(runs))] == ["many", "few"]


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("paper") / "generated"
    runs = collect([str(PAPER / "data" / "kernels_*_h200.json"), str(PAPER / "data" / "largest*.json")]).ok
    return write_paper(runs, folder), folder


def test_the_paper_has_every_number_of_the_kernels(paper: tuple[dict[str, Any], Path]) -> None:
    manifest, _ = paper
    of_kernels = {n: m for n, m in manifest["macros"].items() if m["source"] in ("kernels", "largest")}
    assert [name for name, macro in of_kernels.items() if macro["text"] is None] == []
    texts = {name: macro["text"] for name, macro in of_kernels.items()}
    assert texts["KernelDecodeFourSpeedup"] == "1.45" and texts["KernelDecodeRaggedTwoSpeedup"] == "5.22"
    assert (texts["KernelDecodeOneLeast"], texts["KernelDecodeOneMost"]) == ("0.47", "0.84")
    assert texts["KernelShareOneKFour"] == "3.15" and texts["KernelShareHundredKFour"] == "0.19"
    assert texts["KernelWriteOneKFour"] == "26.1" and texts["KernelShareWideFour"] == "1.91"
    assert texts["LargestNuqTwo"] == "362" and texts["LargestNuqTwoTimes"] == "6.6"
    # What several parts have is of the one with most rows.
    assert of_kernels["KernelCopy"]["run"].endswith(f"{MAIN}.json")
    assert of_kernels["KernelDecodeLongFourSpeedup"]["run"].endswith("128k_h200.json")


def test_the_papers_tables_have_a_line_for_each_case(paper: tuple[dict[str, Any], Path]) -> None:
    manifest, folder = paper
    decode = (folder / "table-decode.tex").read_text()
    assert r"\multicolumn{2}{c}{full precision}" in decode and decode.count(r"\midrule") == 3
    assert r"llama31\_8b 8 $\times$ 32,768 & cudnn & 243 & 163 & 164 & 149 & 1.45 & 1.44 & 1.59 &" in decode
    assert r"1 $\times$ 131,072 & flex & 21,290 &" in (folder / "table-chunk.tex").read_text()
    share = (folder / "table-layershare.tex").read_text()
    assert r"1 $\times$ 1,024 & 829 & 26.1 & 28.3 & 25.9 & 3.15 & 3.41 & 3.13" in share
    assert "nuq3 & 257 & 4.67x" in (folder / "table-largest.tex").read_text()
    assert len(manifest["tables"]["table-decode"]) == 3
    commands = (folder / "commands.tex").read_text()
    assert commands.count(r"every operation on a GPU: \texttt{") == 3
