"""Where a stage's tensors lie in its buffer, and a stage's states."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_async.pipeload.stage import Stage, StageLayout, StageState
from hermes_async.storage.buffers import ALIGNMENT, Buffer, align_up
from hermes_async.storage.reader import Reader, ReadStatistics
from hermes_async.storage.tensor_spec import TensorSpec

FILE_BYTES = 400_000


def spec(offset: int, nbytes: int, file: str = "a") -> TensorSpec:
    return TensorSpec(f"{file}:{offset}", Path(file), offset, nbytes, torch.uint8, (nbytes,))


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[str, TensorSpec]]:
    """Tensors of two files, apart or next to each other, in any order, some of them shared."""
    specs = []
    for file in ("a", "b"):
        end = draw(st.integers(0, 5000))
        for _ in range(draw(st.integers(0, 6))):
            nbytes = draw(st.integers(1, 9000))
            specs.append(spec(end, nbytes, file))
            end += nbytes + draw(st.sampled_from([0, 0, 3, 4096, 65_536, 65_537, 90_000]))
    chosen = draw(st.lists(st.sampled_from(specs), max_size=10)) if specs else []
    return [(f"p{idx}", item) for idx, item in enumerate(chosen)]


@settings(deadline=None)
@given(tensors())
def test_placements_hold_exactly_the_tensors_bytes(items: list[tuple[str, TensorSpec]]) -> None:
    layout = StageLayout.of("layer", items)
    assert [placement.name for placement in layout.placements] == [name for name, _ in items]
    end = 0  # of the blocks that the reads so far write
    for item in layout.ranges:
        assert item.position % ALIGNMENT == item.offset % ALIGNMENT
        assert item.position // ALIGNMENT * ALIGNMENT >= end, "two reads write to one block"
        end = -(-(item.position + item.nbytes) // ALIGNMENT) * ALIGNMENT
    assert end <= layout.slot_bytes
    for placement, (_, tensor) in zip(layout.placements, items, strict=True):
        assert (placement.dtype, placement.shape) == (tensor.dtype, tensor.shape)
        assert any(
            item.file == tensor.file
            and item.offset <= tensor.offset
            and tensor.offset + tensor.nbytes <= item.offset + item.nbytes
            and placement.position - item.position == tensor.offset - item.offset
            for item in layout.ranges
        )
    assert layout.slot_bytes % ALIGNMENT == 0
    assert layout.weight_bytes == sum({item.name: item.nbytes for _, item in items}.values())
    assert layout.weight_bytes <= layout.read_bytes <= layout.slot_bytes


def test_neighbours_in_a_file_are_one_read_and_shared_tensors_are_read_once() -> None:
    layout = StageLayout.of("layer", [("w", spec(100, 50)), ("b", spec(150, 50)), ("tied", spec(100, 50))])
    (item,) = layout.ranges
    assert (item.offset, item.nbytes, item.position) == (100, 100, 100)
    assert [placement.position for placement in layout.placements] == [100, 150, 100]
    assert (layout.weight_bytes, layout.read_bytes, layout.slot_bytes) == (100, 100, ALIGNMENT)


def test_a_tensor_without_elements_takes_a_place_and_no_bytes() -> None:
    layout = StageLayout.of("layer", [("w", spec(100, 50)), ("empty", spec(150, 0)), ("far", spec(300_000, 0))])
    assert [placement.name for placement in layout.placements] == ["w", "empty", "far"]
    assert layout.read_bytes == 50
    assert StageLayout.of("layer", [("empty", spec(10, 0))]).slot_bytes == 0
    # It may begin where another one does.
    layout = StageLayout.of("layer", [("w", spec(100, 50)), ("empty", spec(100, 0))])
    assert (layout.read_bytes, layout.weight_bytes) == (50, 50)


def test_a_stage_without_tensors() -> None:
    layout = StageLayout.of("layer", [])
    assert (layout.placements, layout.ranges, layout.slot_bytes) == ((), (), 0)


@pytest.mark.anyio
async def test_a_read_puts_every_tensor_in_its_place(tmp_path: Path) -> None:
    data = bytes(torch.arange(FILE_BYTES, dtype=torch.int64).mul(7919).remainder(251).to(torch.uint8).tolist())
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(data if name == "a" else data[::-1])
    items = [
        ("one", spec(13, 5000, str(tmp_path / "a"))),
        ("two", spec(5013, 1, str(tmp_path / "a"))),
        ("three", spec(200_000, 9000, str(tmp_path / "a"))),
        ("four", spec(FILE_BYTES - 10, 10, str(tmp_path / "b"))),
    ]
    layout = StageLayout.of("layer", items)
    buffer = Buffer(layout.slot_bytes)
    with ThreadPoolExecutor(1) as executor:
        async with Reader([tmp_path / "a", tmp_path / "b"], executor, ReadStatistics()) as reader:
            await reader.read(layout.ranges, buffer.view)
    for placement, (_, tensor) in zip(layout.placements, items, strict=True):
        view = buffer.tensor(placement.position, placement.dtype, placement.shape)
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            assert view.numpy().tobytes() == file.read(tensor.nbytes)


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(20))
async def test_joined_tensors_are_side_by_side_and_touch_nothing_else(tmp_path: Path, seed: int) -> None:
    """Even seeds: all lies to blocks as it will in the buffer, and is read to where it belongs."""
    generator = random.Random(seed)
    unit = ALIGNMENT if seed % 2 == 0 else 1
    contents = {str(tmp_path / name): generator.randbytes(FILE_BYTES) for name in ("a", "b")}
    for path, data in contents.items():
        Path(path).write_bytes(data)  # noqa: ASYNC240

    def piece() -> TensorSpec:
        nbytes = generator.randint(1, 40_000 // unit) * unit
        offset = generator.randint(0, (FILE_BYTES - nbytes - 100) // unit) * unit + (100 if unit > 1 else 0)
        return spec(offset, nbytes, generator.choice(list(contents)))

    def joined() -> TensorSpec:
        pieces = [piece() for _ in range(generator.randint(2, 5))]
        return TensorSpec.joined(pieces, (sum(one.nbytes for one in pieces),))

    items = [("plain", spec(300_000, 5000, str(tmp_path / "a"))), ("one", joined()), ("two", joined())]
    items.append(("tied", items[1][1]))
    layout = StageLayout.of("layer", items)
    buffer = Buffer(layout.slot_bytes)
    with ThreadPoolExecutor(1) as executor:
        async with Reader(list(map(Path, contents)), executor, ReadStatistics()) as reader:
            await reader.read(layout.ranges, buffer.view)
    for placement, (_, tensor) in zip(layout.placements, items, strict=True):
        expected = b"".join(
            contents[str(one.file)][one.offset : one.offset + one.nbytes] for one in tensor.pieces or [tensor]
        )
        assert buffer.tensor(placement.position, placement.dtype, placement.shape).numpy().tobytes() == expected
    assert layout.placements[1].position == layout.placements[3].position
    assert layout.weight_bytes == layout.read_bytes == sum(tensor.nbytes for _, tensor in items[:3])
    parameters = sum(align_up(tensor.nbytes) + ALIGNMENT for _, tensor in items[:3])
    assert layout.slot_bytes <= parameters + (2 * ALIGNMENT if unit > 1 else 256 * 1024)


async def _woken(event: anyio.Event) -> None:
    with anyio.fail_after(30):
        await event.wait()


@pytest.mark.anyio
async def test_a_stage_goes_through_its_states() -> None:
    stage = Stage(0, StageLayout.of("layer", [("w", spec(0, 10))]), resident=False)
    assert (stage.name, stage.state) == ("layer", StageState.EMPTY)
    buffer = Buffer(10)
    for _ in range(2):
        emptied = stage.emptied
        stage.start_loading(buffer, None)
        assert stage.state is StageState.LOADING
        assert stage.emptied is not emptied
        ready = stage.ready
        stage.set_ready(None)
        await _woken(ready)
        assert stage.state is StageState.READY
        emptied = stage.emptied
        assert stage.clear() == (buffer, None)
        await _woken(emptied)
        assert stage.state is StageState.EMPTY
        assert stage.ready is not ready
        assert not stage.ready.is_set()
