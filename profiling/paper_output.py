"""Everything that a run of ``profiling.paper`` leaves in its folder, made from the rows that were measured."""

import json
from pathlib import Path
from typing import Any

from decoding.display import coloured, legend, stage_styles
from profiling import completion, dram, paper_figures, passes
from profiling.paper_report import report
from profiling.paper_runs import BASELINE
from profiling.paper_session import Session, sources, suites
from profiling.paper_tables import bars, summarise
from profiling.peers import NEVER
from profiling.prompts import SETTINGS, TOP_K
from profiling.rows import write_csv
from profiling.timing import ceilings


def write(session: Session, about: dict[str, Any], rows: list[dict]) -> None:
    """The roofline's points and the completion are measured; then every file of the report is written."""
    config, decoder, out = session.config, session.decoder, session.config.out
    model = decoder.oracle.model
    rates = ceilings(model.device, model.dtype, max(2, config.samples // 2))._asdict()
    points = []
    for stage in (decoder.oracle, *(stage for stage in reversed(decoder.lower) if hasattr(stage, "model"))):
        points += passes.points(stage.model, stage.name, config.figure_rows, config.samples)
    document = {
        "about": about,
        "run": described(session),
        "skipped_peers": session.skipped,
        "ceilings": rates,
        "points": points,
        "dram": dram_traffic(session),
        "summary": summarise(rows),
    }
    found = bars(document["summary"], model.device.type)
    document["bars"] = [bar._asdict() for bar in found]
    title = f"{about['device']}, {decoder.runtime}, commit {about['commit']}"
    paper_figures.roofline(rates, points, title, out / "figure1")
    paper_figures.sorted_problems(rows, title, out / "figure2")
    colour_completion(session, out / "figure3")
    text = json.dumps(document, indent=1, default=str)[:-2]  # rows one a line below it, so that they can be compared
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    (out / "paper.json").write_text(f'{text},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    write_csv(out / "paper.csv", rows)
    (out / "report.md").write_text(report(document, found), encoding="utf-8")


def described(session: Session) -> dict[str, Any]:
    """What the report says about the run beside the machine."""
    config = session.config
    drafts, tables = sources(config)
    chosen = {"oracle": config.oracle, "draft": drafts[0], "draft2": tables[0]}
    names = {name: "/".join(Path(str(value)).parts[-2:]) if value else "none" for name, value in chosen.items()}
    return names | {
        "prompts": session.source,
        "num_prompts": len(session.prompt_ids),
        "tokens": config.tokens,
        "seeds": config.seeds,
        "peer_seeds": config.peer_seeds,
        "runtime": session.decoder.runtime,
        "ablation_tokens": config.ablation_tokens,
        "rehearsal": config.rehearsal,
    }


def dram_traffic(session: Session) -> dict[str, Any]:
    """Bytes per token by hardware counters, relative to the baseline, by setting and method; or why there are none."""
    config, relative = session.config, {}
    for setting, sampling in SETTINGS.items():
        methods = [method for method in suites(session)["paper"] if method.kind == "method"]

        def generation(method, sampling=sampling):
            ids = session.prompt_ids[0]
            return lambda: len(method.generate(ids, config.tokens, {**sampling, "seed": 0}, NEVER))

        moved, reason = dram.bytes_per_token(session.device, {method.name: generation(method) for method in methods})
        if reason:
            return {"relative": {}, "reason": f"not measured, {reason}"}
        relative[setting] = {name: value / moved[BASELINE] for name, value in moved.items()}
    return {"relative": relative, "reason": ""}


def colour_completion(session: Session, stem: Path) -> None:
    """Figure 3: the first prompt, sampled, by the fullest method."""
    decoder = session.decoder
    out = decoder.generate(session.prompt_ids[0], session.config.tokens, seed=0, **SETTINGS[TOP_K])
    styles = stage_styles([stage.name for stage in decoder.lower])
    shown = coloured(decoder.tokenizer, session.first_prompt, out.new_token_ids, out.token_stages, styles)
    completion.write(shown, legend(styles), stem)
