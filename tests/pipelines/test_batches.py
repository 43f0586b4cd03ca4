"""How many items share an evaluation of the network: of a device, where memory does not suffice, and compiled."""

import warnings
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import anodiff.pipelines.batches
from anodiff.pipelines.batches import Batches, _Limit, choose_batch_size

from ..tiny import assert_same_map, make_pipeline, make_slices, make_volume


def limit_memory(pipe, monkeypatch, most: int) -> list[int]:
    """Lets the UNet run out of memory above `most` items; gives the sizes of the batches that it is asked for."""
    forward, asked = pipe.unet.forward, []

    def limited(sample, *inputs):
        asked.append(len(sample))
        if len(sample) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(sample, *inputs)

    monkeypatch.setattr(pipe.unet, "forward", limited)
    return asked


@pytest.mark.parametrize(
    ("shape", "device", "expected"),
    [
        ((4, 128, 128), "cpu", 16),
        ((4, 128, 128), "cuda", 512),
        ((4, 256, 256), "cuda", 128),
        ((1, 32, 32), "cuda", 512),
        ((4, 2048, 2048), "cuda", 16),
    ],
)
def test_items_that_are_taken_up_together(shape, device, expected):
    assert choose_batch_size(shape, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([1000, 2000, 4000, 4100], (64, False)),  # the last one is faster by less than a twentieth
        ([1000, 900], (16, False)),
        ([1000, 2000], (32, True)),
        ([1000, 2000, 3000, 4000, 5000, 6000], (512, False)),
    ],
)
def test_a_limit_grows_as_long_as_that_is_faster(rates, expected):
    limit = _Limit(16, True)
    for doubled, rate in enumerate(rates):
        limit.learn(16 * 2**doubled, rate)
    assert (limit.items, limit.growing) == expected


@pytest.mark.parametrize("name", ["ANDiPipeline", "AnoFPDMPipeline", "SADMPipeline"])
def test_a_batch_that_the_memory_does_not_hold_is_halved(name, monkeypatch):
    pipe, slices = make_pipeline(name), make_slices(3)
    expected = pipe(slices).anomaly_map
    with monkeypatch.context() as patch:
        asked = limit_memory(pipe, patch, 1)
        assert_same_map(pipe(slices).anomaly_map, expected, 1e-4)
        failed = [size for size in asked if size > 1]
        assert failed and failed == sorted(failed, reverse=True) and asked[: len(failed)] == failed
        # It is remembered.
        asked.clear()
        pipe(slices)
        assert set(asked) == {1}
        # Another shape has memory of its own.
        asked.clear()
        pipe(make_slices(2)[..., :8, :8])
        assert asked[0] > 1


def test_what_is_computed_is_kept(monkeypatch, caplog):
    pipe = make_pipeline("DAEPipeline")
    asked = limit_memory(pipe, monkeypatch, 2)
    pipe(make_slices(9, value_range=(0.0, 1.0)))
    assert asked == [9, 4, 2, 2, 2, 2, 1]
    forward, batches = pipe.unet.forward, []

    def tighter(sample):
        batches.append(len(sample))
        if len(batches) > 2 and len(sample) > 1:
            raise torch.OutOfMemoryError
        return forward(sample)

    monkeypatch.setattr(pipe.unet, "forward", tighter)
    pipe(make_slices(9, value_range=(0.0, 1.0)))
    assert batches == [2, 2, 2, 1, 1, 1, 1, 1]
    said = [(9, 4), (4, 2), (2, 1)]
    assert caplog.messages == [f"The memory does not hold a batch of {a}: {b} from now on." for a, b in said]


def test_a_batch_that_was_given_is_not_changed(monkeypatch):
    pipe = make_pipeline("DAEPipeline")
    asked = limit_memory(pipe, monkeypatch, 2)
    slices = make_slices(5, value_range=(0.0, 1.0))
    with pytest.raises(torch.OutOfMemoryError, match="not hold a batch of 4: give a smaller `batch_size`, or none"):
        pipe(slices, batch_size=4)
    pipe(slices, batch_size=2)
    assert asked == [4, 2, 2, 1]
    limit_memory(pipe, monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError, match="does not hold a single slice: free some"):
        pipe(slices)


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        *[("ANDiPipeline", 2), ("AnoFPDMPipeline", 2), ("AnoFPDMPipeline", None), ("CDDPMPipeline", 2)],
        *[("CIMDPipeline", 2), ("DAEPipeline", 2), ("DDIBPipeline", 2)],
    ],
)
def test_one_graph_serves_a_call(name, batch_size, monkeypatch):
    """Whatever the last batch holds, and whichever class it has."""
    pipe, volume = make_pipeline(name), make_volume((18, 20, 3))
    expected = pipe(volume, batch_size=batch_size)
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    pipe.enable_fast_inference(compile=True)
    result = pipe(volume, batch_size=batch_size)
    if name == "CIMDPipeline":
        assert_same_map(result.member_maps, expected.member_maps, 1e-4)
    else:
        assert_same_map(result.anomaly_map, expected.anomaly_map, 1e-4)
    assert counter.frame_count == 1
    assert result.settings["fast"] == {"mixed_precision": "no", "channels_last": True, "compile": True}


def test_fewer_slices_are_padded_and_more_make_a_larger_graph(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    network = torch.nn.Conv2d(1, 1, 3)
    batches = Batches(network)
    batches.automatic = True
    for count, graphs in ((5, 1), (3, 1), (7, 2), (4, 2)):
        sample, timesteps = torch.rand(count, 1, 8, 8), torch.arange(count)
        output = batches.evaluate(
            network, lambda net, sample, steps: net(sample) + steps[:, None, None, None], sample, timesteps
        )
        assert output.shape == (count, 1, 6, 6)
        torch.testing.assert_close(output, network(sample) + timesteps[:, None, None, None], rtol=0, atol=1e-6)
        assert counter.frame_count == graphs


def test_a_compiled_batch_wastes_little(monkeypatch):
    """Of 5 items and room for 4, two evaluations of 3."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    monkeypatch.setattr(anodiff.pipelines.batches, "MOST_ITEMS", 4)
    network, asked = torch.nn.Conv2d(1, 1, 3), []
    batches = Batches(network)
    batches.automatic = True

    def call(network, sample):
        asked.append(len(sample))
        return network(sample)

    sample = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(batches.evaluate(network, call, sample), network(sample))
    assert asked == [3, 3]
    # Units of 3 that come twice at once keep their graph.
    batches.evaluate(network, call, torch.rand(6, 1, 8, 8), unit=3)
    assert asked == [3, 3, 3, 3]


def test_fast_is_chosen_by_the_device_and_what_is_given_wins():
    pipe = make_pipeline("ANDiPipeline")
    for given, expected in (
        ({}, ("no", True, False)),
        ({"mixed_precision": "bf16", "channels_last": False}, ("bf16", False, False)),
    ):
        pipe.enable_fast_inference(**given)
        assert pipe.fast == dict(zip(("mixed_precision", "channels_last", "compile"), expected, strict=True))
    with pytest.raises(ValueError, match="`mixed_precision` must be one of no, bf16, fp16, None, got 'int8'"):
        pipe.enable_fast_inference(mixed_precision="int8")
    with pytest.raises(ValueError, match="`cuda_graphs` replays what is compiled"):
        pipe.enable_fast_inference(cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"mixed_precision": "no"}, {"cuda_graphs": True}])
def test_fast_on_a_gpu(settings):
    pipe = make_pipeline("AnoFPDMPipeline").to("cuda")
    slices = make_slices(40)
    expected = pipe(slices).anomaly_map
    pipe.enable_fast_inference(**settings)
    assert_same_map(pipe(slices).anomaly_map, expected, 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ANDiPipeline", "AnoDDPMPipeline"])
def test_no_batch_waits_for_what_the_device_does(name):
    pipe = make_pipeline(name).to("cuda")

    def count_waits(batches: int) -> int:
        slices = make_slices(4 * batches)
        pipe(slices, batch_size=4)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                pipe(slices, batch_size=4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return len([one for one in seen if "synchroniz" in str(one.message)])

    assert count_waits(2) == count_waits(6)
