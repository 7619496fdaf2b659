"""Estimates training on many GPUs: bytes sent, overlap with computation, and the limits of scaling.

    python benchmarks/scaling.py                          # the tables of docs/scaling.md
    python benchmarks/scaling.py --share 0.3              # with other assumptions

Nothing is measured. Weights are counted in the real modules (`scaling_bytes.py`) and operations by `flops.py`. The
rates of the hardware are assumptions, each with an option; `scaling_seconds.py` computes times from them.
"""

import argparse

from flops import model_flops
from rich.console import Console
from rich.table import Table
from scaling_bytes import ddp_bytes, fsdp_bytes, numbers, on_paper, small_bytes, state_bytes, trained
from scaling_seconds import Hardware, ddp_seconds, fsdp_seconds, step_on

from dino_lightning.config import CropsConfig, DINOConfig, ViTConfig
from dino_lightning.methods.student_teacher import StudentTeacher

NETWORKS = {"vit_small": 64, "vit_base": 32, "vit_large": 16}
"""Network -> images per GPU; the first two as in `experiment=vits16_100ep` and `vitb16`."""
GPUS = (8, 64, 512)
LOADER = "images/s per core with crops=pil, cpu and device (benchmarks/data.py measures them)"

Networks = dict[str, tuple[ViTConfig, StudentTeacher]]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--matrix", type=float, default=790.0, help="TFLOP/s of large bfloat16 products on one GPU")
    parser.add_argument("--share", type=float, default=0.45, help="share of this rate that a step sustains")
    parser.add_argument("--memory", type=float, default=4800.0, help="memory bandwidth of a GPU, GB/s")
    parser.add_argument("--nvlink", type=float, default=450.0, help="bandwidth of a GPU to those of its node, GB/s")
    parser.add_argument(
        "--nodes", type=float, nargs=2, default=[400.0, 12.5], help="network bandwidths of a node, GB/s"
    )
    parser.add_argument("--attained", type=float, default=0.8, help="share of these rates in collectives")
    parser.add_argument("--total", type=int, default=1024, help="images per step with a constant total batch")
    parser.add_argument("--loader", type=float, nargs="+", default=[87.0, 481.0, 774.0], help=LOADER)
    parser.add_argument("--markdown", action="store_true", help="print the tables as in docs/scaling.md")
    options = parser.parse_args()
    fabrics = [
        Hardware(
            options.matrix * options.share * 1e12,
            options.memory * 1e9,
            options.nvlink * 1e9,
            node * 1e9,
            options.attained,
        )
        for node in options.nodes
    ]
    networks = {name: on_paper(name) for name in NETWORKS}
    for table in (
        counts(networks),
        wire(networks),
        growing(networks, fabrics),
        fixed(networks, fabrics, options.total),
        feeding(networks, fabrics[0], options.loader),
    ):
        print(markdown(table)) if options.markdown else Console(width=150).print(table)


def markdown(table: Table) -> str:
    """A table as Markdown, without the title."""
    rows = [[str(column.header) for column in table.columns], ["---"] * len(table.columns)]
    rows += [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def counts(networks: Networks) -> Table:
    """Weights, operations and memory of the networks."""
    table = Table(
        *("network", "trained weights, M", "of the backbone", "GFLOP / image", "state / GPU, GB: DDP"),
        *(f"FSDP, {gpus} GPUs" for gpus in GPUS),
        title="weights, operations and memory",
    )
    for name, (backbone, method) in networks.items():
        weights = trained(method.student), trained(method.student.backbone)
        state = [state_bytes(method), *(state_bytes(method, slices=gpus) for gpus in GPUS)]
        cost = model_flops(backbone, crops=CropsConfig(), method=DINOConfig()) / 1e9
        table.add_row(
            name,
            *(f"{numbers(parameters) / 1e6:.2f}" for parameters in weights),
            f"{cost:.1f}",
            *(f"{size / 1e9:.3f}" for size in state),
        )
    return table


def wire(networks: Networks) -> Table:
    """Bytes that each GPU sends in a step."""
    kinds = ("teacher", "forward", "backward", "gradients")
    table = Table(
        *("network", "GPUs", "DDP"),
        *(f"FSDP, {kind}" for kind in kinds),
        "FSDP, all",
        "FSDP / DDP",
        "center",
        title="sent by each GPU in a step, MB, in addition to at most 8 bytes for the loss",
    )
    for name, (_, method) in networks.items():
        for gpus in GPUS:
            ddp, fsdp = ddp_bytes(method.student, gpus=gpus), fsdp_bytes(method, gpus=gpus)
            center = small_bytes(DINOConfig().out_dim, gpus=gpus)["center"]
            sizes = [ddp, *(fsdp[kind] for kind in kinds), sum(fsdp.values())]
            table.add_row(
                name,
                str(gpus),
                *(f"{size / 1e6:.0f}" for size in sizes),
                f"{sizes[-1] / ddp:.2f}",
                f"{center / 1e6:.3f}",
            )
    return table


def growing(networks: Networks, fabrics: list[Hardware]) -> Table:
    """Constant batch per GPU."""
    titles = [f"{kind}, {fabric.node / 1e9:g} GB/s" for fabric in fabrics for kind in ("DDP", "FSDP")]
    table = Table(
        *("network", "GPUs", "batch", "step alone, ms", "backward, ms"),
        *titles,
        "images / GPU that hide DDP's",
        title="communication in ms -> throughput relative to a GPU that does not communicate",
    )
    for name, (backbone, method) in networks.items():
        for gpus in GPUS:
            step = step_on(fabrics[0], backbone, method, images=NETWORKS[name])
            cells, hiding = [f"{step.alone * 1e3:.1f}", f"{step.backward * 1e3:.1f}"], []
            for fabric in fabrics:
                cells += both(fabric, backbone, method, images=NETWORKS[name], gpus=gpus)
                way, _ = ddp_seconds(fabric, step, method, gpus=gpus)
                hiding.append(f"{way / step.backward * NETWORKS[name]:.1f}")
            table.add_row(name, str(gpus), str(gpus * NETWORKS[name]), *cells, " / ".join(hiding))
    return table


def both(hardware: Hardware, backbone: ViTConfig, method: StudentTeacher, *, images: int, gpus: int) -> list[str]:
    """DDP and FSDP: communication time, and throughput relative to a GPU that does not communicate."""
    step = step_on(hardware, backbone, method, images=images)
    sharded = step_on(hardware, backbone, method, images=images, slices=gpus)
    ways = [
        (step, ddp_seconds(hardware, step, method, gpus=gpus)),
        (sharded, fsdp_seconds(hardware, sharded, backbone, method, gpus=gpus)),
    ]
    return [f"{way * 1e3:.1f} -> {step.alone / (each.alone + exposed):.0%}" for each, (way, exposed) in ways]


def fixed(networks: Networks, fabrics: list[Hardware], total: int) -> Table:
    """Constant total batch."""
    titles = [f"DDP, {fabric.node / 1e9:g} GB/s" for fabric in fabrics]
    table = Table("network", "GPUs", "images / GPU", "step alone, ms", *titles, title=f"{total} images in a step")
    for name, (backbone, method) in networks.items():
        for gpus in GPUS:
            images = total // gpus
            alone = step_on(fabrics[0], backbone, method, images=images).alone
            cells = [both(fabric, backbone, method, images=images, gpus=gpus)[0] for fabric in fabrics]
            table.add_row(name, str(gpus), str(images), f"{alone * 1e3:.1f}", *cells)
    return table


def feeding(networks: Networks, hardware: Hardware, rates: list[float]) -> Table:
    """The rate that the data loader must reach."""
    titles = [f"cores / GPU at {rate:g} images / s" for rate in rates]
    table = Table("network", "images / s and GPU", *titles, title="data loading")
    for name, (backbone, method) in networks.items():
        rate = NETWORKS[name] / step_on(hardware, backbone, method, images=NETWORKS[name]).alone
        table.add_row(name, f"{rate:.0f}", *(f"{rate / core:.1f}" for core in rates))
    return table


if __name__ == "__main__":
    main()
