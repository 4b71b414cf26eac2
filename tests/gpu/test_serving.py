"""The engine of the server on a pretended GPU: the CPU's tokens, and one wait of the host a step."""

import torch
from support.pretended_gpu import PretendedGpu
from support.serving import EveryAdapter, request_for
from support.tiny import randomize, small_model

from minilora import LoraConfig, add_lora
from minilora.inference.assistant import GenerationSettings
from minilora.serving.engine import Engine
from minilora.serving.slots import SlotCache

GREEDY = GenerationSettings(temperature=0, max_new_tokens=9)
SETTINGS = [GREEDY, GenerationSettings(temperature=0, repetition_penalty=1.3, max_new_tokens=6)]


def two_adapters(quantized):
    model = small_model(layers=2, quantized=quantized)
    add_lora(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]), "other")
    randomize(model)
    return model.eval()


def engine_with_requests(model, settings) -> tuple[Engine, list]:
    table = model.model.embed_tokens.weight
    cache = SlotCache(model.config, 4, 64, table.dtype, table.device)
    engine, answers = Engine(model, EveryAdapter(8), cache), []
    extend = engine._extend

    def noting(rows, logits):
        answers.extend(row.answer for row in rows if row.answer not in answers)
        extend(rows, logits)

    engine._extend = noting
    for i, name in enumerate(["default", None, "other", "default", "other", None]):
        prompt = [(7 * i + j) % 97 for j in range(3 + 5 * i)]
        engine.submit(request_for(prompt, name, settings[i % len(settings)], end_ids=()))
    return engine, answers


def tokens_of(engine, answers) -> dict:
    while engine.rows or engine.waiting:
        engine.step()
    engine._unmix()
    return {tuple(answer.request.prompt): answer.tokens for answer in answers}


def test_a_batch_of_adapters_has_the_tokens_of_the_cpu():
    model = two_adapters(quantized=True)
    expected = tokens_of(*engine_with_requests(model, SETTINGS))
    with PretendedGpu() as gpu:
        found = tokens_of(*engine_with_requests(model.cuda(), SETTINGS))
    assert found == expected and len(found) == 6
    assert not gpu.faults


def test_sampled_rows_wait_once_a_step_for_their_tokens():
    with PretendedGpu() as gpu:
        model = two_adapters(quantized=False).cuda()
        engine, _ = engine_with_requests(model, [GenerationSettings(max_new_tokens=12), *SETTINGS])
        for _ in range(3):
            engine.step()
        assert len(engine.rows) == 4
        with gpu.during() as record, torch.no_grad():
            engine._read_tokens([row.request for row in engine.rows])
        engine._unmix()
    assert sum(record.waits.values()) == 1, record.waits
    assert not gpu.faults
