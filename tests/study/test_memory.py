"""The memory plan of a study: its arithmetic, its choice, and what it says does not fit."""

from dataclasses import replace

import pytest

from paretomerge.study.memory import (
    CUDA_CONTEXT_BYTES,
    PROCESS_BYTES,
    Machine,
    Models,
    plan_memory,
    scoring_bytes,
    this_machine,
)
from tests.studies import open_search
from tests.study.test_build import write

GB = 10**9
# Llama 2 7B with three full fine-tunes, in bfloat16.
SEVEN_B = Models(
    whole=4 * 13_476_831_232,
    computed=0,
    mapped=4 * 13_476_831_232,
    live=13_476_831_232,
    pool=0,
    written=13_476_831_232,
    cpu_work=GB // 2,
    gpu_work=3 * GB,
    host_work=GB // 10,
    score=4 * GB,
)
# An RTX 4090, of which the screen takes some.
CARD = Machine(host=90 * GB, gpu=24 * GB, gpus=1, disk=100 * GB)


def test_7b_with_three_fine_tunes_fits_on_a_24_gb_card_with_mapped_sources():
    plan = plan_memory(SEVEN_B, CARD, "cuda")
    assert plan.sources == "mmap" and plan.problems == ()
    assert plan.gpu == CUDA_CONTEXT_BYTES + SEVEN_B.live + SEVEN_B.score
    resident = plan_memory(SEVEN_B, CARD, "cuda", "device")
    assert resident.gpu == plan.gpu + SEVEN_B.whole
    (problem,) = resident.problems
    assert "The GPU is too small" in problem and "`sources: mmap`" in problem
    # On a card of 80 GB the sources stay there, which is faster.
    large = plan_memory(SEVEN_B, replace(CARD, gpu=80 * GB), "cuda")
    assert large.sources == "device" and large.problems == ()


def test_files_that_do_not_stay_in_memory_are_read_again():
    plan = plan_memory(SEVEN_B, replace(CARD, host=40 * GB), "cuda")
    (problem,) = plan.problems
    assert "from the disk again" in problem
    resident = plan_memory(
        SEVEN_B, replace(CARD, host=40 * GB, gpu=80 * GB), "cuda", "device"
    )
    assert resident.problems == ()


def test_workers_are_spread_over_gpus_and_share_the_mapped_files():
    eight = replace(CARD, host=400 * GB, gpus=8)
    plan = plan_memory(SEVEN_B, eight, "cuda", workers=8)
    assert plan.gpu == plan_memory(SEVEN_B, CARD, "cuda").gpu
    assert plan.mapped == SEVEN_B.mapped
    sixteen = plan_memory(SEVEN_B, eight, "cuda", workers=16)
    assert sixteen.gpu == 2 * plan.gpu
    assert "fewer `workers`" in sixteen.problems[0]
    on_cpu = plan_memory(SEVEN_B, eight, "cpu", workers=2)
    per_worker = SEVEN_B.live + SEVEN_B.score
    assert on_cpu.host == 3 * PROCESS_BYTES + 2 * per_worker and on_cpu.gpu is None


def test_computed_tensors_are_kept_on_the_cpu_where_they_fit():
    models = replace(SEVEN_B, computed=20 * GB, mapped=13 * GB)
    roomy = plan_memory(models, CARD)
    assert roomy.sources == "device" and roomy.kept == 20 * GB
    tight = plan_memory(models, replace(CARD, host=40 * GB))
    assert tight.sources == "mmap" and tight.kept == 0 and tight.problems == ()


def test_routes_keep_their_sources_on_the_gpu():
    routed = replace(SEVEN_B, routed=True)
    plan = plan_memory(routed, CARD, "cuda", "mmap")
    assert plan.kept == SEVEN_B.whole
    assert "sources: mmap" not in plan.problems[0]


def test_what_does_not_fit_is_named_with_its_cure():
    small = Machine(host=8 * GB, gpu=None, gpus=0, disk=GB)
    memory, disk = plan_memory(SEVEN_B, small, workers=4).problems
    assert "The memory is too small" in memory and "fewer `workers`" in memory
    assert "The disk is too full: one merge takes 13.5 GB" in disk


def test_scoring_grows_with_the_batch_and_ends_at_the_longest_sequence():
    config = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    }
    one, two = (scoring_bytes(config, "bfloat16", n) for n in (1, 2))
    assert two == 2 * one
    # Half a megabyte of keys and values for each token.
    assert 512 * 2**19 < one < 1.2 * 512 * 2**19
    short = scoring_bytes({**config, "max_position_embeddings": 64}, "bfloat16", 1)
    assert short < one / 4


def test_the_sizes_of_a_study_come_from_its_headers(pico, tmp_path):
    search = open_search(write(tmp_path, pico))
    plan = search.memory_plan(batch_size=4)
    sizes = []
    for name in ("base", "ada", "bob"):
        for file in (pico / name).glob("*.safetensors"):
            sizes.append(file.stat().st_size)
    # The files have headers besides.
    assert 0.5 * sum(sizes) < plan.mapped < sum(sizes)
    assert plan.disk == plan.live and plan.problems == ()
    assert search.sources == plan.sources == "mmap"


def test_the_free_space_of_this_machine(tmp_path):
    machine = this_machine(tmp_path / "not" / "yet" / "there")
    assert machine.host > 10**8 and machine.disk > 0
    assert machine.gpu is None and machine.gpus == 0


@pytest.mark.parametrize("setting", ["mmap", "device"])
def test_the_setting_decides(pico, tmp_path, setting):
    search = open_search(write(tmp_path, pico, sources=setting))
    assert search.sources == setting
    model = search.first_level.model
    assert model.sources_on_device == (setting == "device")
