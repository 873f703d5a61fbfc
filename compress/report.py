"""What a compression did, for people and programs: errors of each layer, loss, sizes, a picture."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass

from compress.loss import Loss
from compress.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Sizes:
    """Before and after."""

    plain_bytes: int  # of all weight files
    compressed_bytes: int
    bits_per_weight: float  # of the matrices in layers, scales included


@dataclass(frozen=True, slots=True)
class Report:
    """Of one compression."""

    model: str
    recipe: Recipe
    errors: dict[str, float]  # of each matrix, relative and squared
    schemes: dict[str, str]
    loss: Loss | None
    sizes: Sizes
    predicted_kl_nats: float | None = None  # of mixed precision: the sum of what each product loses by itself
    warning: str = ""  # what a person should know of the file that was written
    took_s: float = 0.0  # not in the files: the same compression gives the same bytes

    def summary(self) -> str:
        """One line."""
        shrunk = self.sizes.compressed_bytes / self.sizes.plain_bytes
        parts = [f"{self.sizes.compressed_bytes / 1e6:.1f} MB ({shrunk:.0%})"]
        if self.loss is not None:
            loss = self.loss
            parts.append(f"loss {loss.added_nats:+.4f} +- {loss.added_nats_spread:.4f} nats a token")
            parts.append(f"KL {loss.kl_nats:.4f}, same choice {loss.top1_agreement:.1%}")
        if self.predicted_kl_nats is not None:
            parts.append(f"KL predicted {self.predicted_kl_nats:.4f}")
        return ", ".join(parts)


def as_json(report: Report) -> str:
    """report.json."""
    content = {
        "model": report.model,
        "recipe": dataclasses.asdict(report.recipe),
        "loss": None if report.loss is None else dataclasses.asdict(report.loss),
        "predicted_kl_nats": report.predicted_kl_nats,
        "sizes": dataclasses.asdict(report.sizes),
        "matrices": {
            name: {"scheme": report.schemes[name], "relative_error": error} for name, error in report.errors.items()
        },
    }
    return json.dumps(content, indent=2) + "\n"


def as_markdown(report: Report) -> str:
    """report.md."""
    sizes, loss = report.sizes, report.loss
    lines = [
        f"# {report.model}, compressed",
        "",
        f"Scheme {report.recipe.scheme.label}, rounding {report.recipe.rounding}, smoothing {report.recipe.smoothing}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| weight files | {sizes.plain_bytes:,} -> {sizes.compressed_bytes:,} bytes |",
        f"| bits per weight of the layers' matrices | {sizes.bits_per_weight:.3f} |",
    ]
    if loss is not None:
        lines += [
            f"| nats a token, plain | {loss.plain_nats:.4f} |",
            f"| added | {loss.added_nats:+.4f} +- {loss.added_nats_spread:.4f} |",
            f"| KL divergence, nats | {loss.kl_nats:.4f} +- {loss.kl_nats_spread:.4f} |",
            f"| same most likely token | {loss.top1_agreement:.2%} |",
            f"| measured on | {loss.num_blocks} blocks, {loss.num_tokens} tokens |",
        ]
    if report.predicted_kl_nats is not None:
        lines.append(f"| KL divergence predicted, if losses added up | {report.predicted_kl_nats:.4f} |")
    lines += ["", "| matrix | scheme | squared error of its output, relative |", "| --- | --- | ---: |"]
    lines += [f"| {name} | {report.schemes[name]} | {error:.3e} |" for name, error in report.errors.items()]
    return "\n".join(lines) + "\n"


def as_picture(report: Report) -> bytes | None:
    """report.png: errors along the layers; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), dpi=110)
    kinds: dict[str, list[float]] = {}
    for name, error in report.errors.items():
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(error)
    for kind, errors in kinds.items():
        axis.plot(range(len(errors)), errors, marker="o", markersize=3, linewidth=0.8, label=kind)
    axis.set(yscale="log", xlabel="layer", ylabel="relative squared error", title=f"{report.model}: {report.summary()}")
    axis.title.set_fontsize(8)
    axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return drawn.getvalue()
