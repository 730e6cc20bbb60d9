"""Chats of several turns, pictures in any of them, several at once on one model: each is what it would be alone."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conversations import Row, check_row, feed, row
from inference import left_padded
from models import IMAGE_TOKEN, text_inputs, tiny_llama, tiny_qwen_vl
from transformers import DynamicCache

import kvcomp

STORED = {
    "dense": ("flowmm", 0.4, {}),
    "ragged": ("ada-kv", 0.4, {}),
    "second pass": ("kvzip", 0.4, {}),
    "carried sums": ("h2o", 0.4, {}),
    "two precisions": ("mikv", 0.95, {}),
    "pairs of layers": ("minicache", 0.95, {}),
    "turned back": ("flowmm", 0.4, {"merger": {"use": "unrotated", "merger": "mean"}}),
    "left as they come": ("snapkv", 0.4, {"turns": "append"}),
    "at every token": ("h2o", 0.4, {"trigger": "over-budget"}),
}
NEW = 3  # tokens of each answer


class Chat:
    """A conversation through `generate`, with a note of what every forward was fed and of what it said."""

    def __init__(self, model, cache, parts: Row) -> None:
        self.model, self.cache, self.parts = model, cache, parts
        self.ids = torch.zeros(1, 0, dtype=torch.long)
        self.forwards: list[torch.Tensor] = []
        self.pixels: dict[int, torch.Tensor] = {}
        self.logits: list[torch.Tensor] = []

    def turn(self, number: int, new: int = NEW) -> "Chat":
        """Say the next part and let the model answer in so many tokens."""
        self.ids = torch.cat([self.ids, self.parts.forwards[number][None]], dim=1)
        if number in self.parts.pixels:
            self.pixels[len(self.forwards)] = self.parts.pixels[number]
        self.forwards.append(self.ids[0, self.cache.get_seq_length() :])
        shown = {0: torch.cat(list(self.pixels.values()))} if self.pixels else {}
        inputs = Row((self.ids[0],), shown).until(0)
        arguments = self.cache.next_turn(self.model, **inputs) if number else inputs | {"past_key_values": self.cache}
        assert not number or ("pixel_values" in arguments) == (number in self.parts.pixels)
        settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        output = self.model.generate(**arguments, max_new_tokens=new, **settings)
        self.ids = output.sequences
        self.forwards += [self.ids[0, place : place + 1] for place in range(-new, -1)]
        self.logits += output.logits
        return self

    def fed(self) -> Row:
        """Everything that was fed, forward by forward."""
        return Row(tuple(self.forwards), self.pixels)


def turns_of(chat: Chat) -> range:
    return range(len(chat.parts.forwards))


TALKS = (row("9i5i7", "4i3", 6, seed=1), row("5i8", 6, "2i2", seed=2))


@pytest.mark.parametrize("name", STORED)
def test_two_chats_in_turn_on_one_model_keep_positions_of_their_own(name):
    """Against bare forwards with positions by the model's own rule, in one shot over the whole conversation."""
    recipe, budget, overrides = STORED[name]
    model = tiny_qwen_vl()
    session = kvcomp.attach(model)
    chats = [Chat(model, session.cache(recipe, budget, **overrides), parts) for parts in TALKS]
    for number in turns_of(chats[0]):
        for chat in chats:
            chat.turn(number)
    for chat in chats:
        cache = session.cache(recipe, budget, **overrides)
        with torch.no_grad():
            expected = feed(model, cache, [chat.fed()])
        for said, alone in zip(chat.logits, expected, strict=True):
            torch.testing.assert_close(said, alone, atol=1e-4, rtol=1e-4)
        for layer, reference in zip(chat.cache.layers, cache.layers, strict=True):
            assert torch.equal(layer.indices, reference.indices)
    session.detach()


@pytest.mark.parametrize("recipe", ["flowmm", "ada-kv", "kvzip", "minicache"])
def test_a_chat_at_budget_one_is_one_uncompressed_run(recipe):
    model = tiny_qwen_vl()
    session = kvcomp.attach(model)
    chats = [Chat(model, session.cache(recipe, 1.0), parts) for parts in TALKS]
    for number in turns_of(chats[0]):
        for chat in chats:
            chat.turn(number)
    session.detach()
    for chat in chats:
        whole, shown = torch.cat(chat.forwards), torch.cat(list(chat.pixels.values()))
        inputs = Row((whole,), {0: shown}).until(0)
        with torch.no_grad():
            logits = model(**inputs, past_key_values=DynamicCache(config=model.config)).logits[0]
        ends = torch.tensor([len(ids) for ids in chat.forwards]).cumsum(0) - 1
        torch.testing.assert_close(torch.cat(chat.logits), logits[ends], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in STORED if name != "turned back"])
def test_a_chat_of_text_through_full_ids_is_what_its_forwards_say(name):
    """`generate(full ids, past_key_values=cache)`, three turns."""
    recipe, budget, overrides = STORED[name]
    model, parts = tiny_llama(), row(40, 9, 14, seed=4)
    session = kvcomp.attach(model)
    cache, other = (session.cache(recipe, budget, **overrides) for _ in range(2))
    ids, fed, logits = torch.zeros(1, 0, dtype=torch.long), [], []
    for new in parts.forwards:
        ids = torch.cat([ids, new[None]], dim=1)
        fed.append(ids[0, cache.get_seq_length() :])
        settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        output = model.generate(ids, past_key_values=cache, max_new_tokens=NEW, **settings)
        ids, logits = output.sequences, [*logits, *output.logits]
        fed += [ids[0, place : place + 1] for place in range(-NEW, -1)]
    with torch.no_grad():
        expected = feed(model, other, [Row(tuple(fed))])
    session.detach()
    for said, alone in zip(logits, expected, strict=True):
        torch.testing.assert_close(said, alone, atol=1e-4, rtol=1e-4)
    assert [layer.tokens for layer in cache.report().layers] == [(40 + 9 + 14 + 3 * NEW - 1,)] * 3


@pytest.mark.parametrize(("recipe", "answered"), [("flowmm", NEW), ("streaming-llm", 1)], ids=["", "one ends early"])
def test_rows_of_a_batch_of_chats_are_those_of_each_chat(recipe, answered):
    """`next_turn` of a padded batch with pictures: each row goes on from its own position.

    In a batch, the last token of an answer that ends early is fed by itself, and alone with the next question. So only
    a recipe that looks at no queries keeps the same.
    """
    model, talks = tiny_qwen_vl(), [row("9i5i7", 8, seed=1), row("5i8", 3, seed=2)]
    with kvcomp.compress(model, recipe, budget=0.4) as together:
        inputs = [talk.until(0) for talk in talks]
        batch = left_padded([one["input_ids"] for one in inputs])
        batch |= {name: torch.cat([one[name] for one in inputs]) for name in ("pixel_values", "image_grid_thw")}
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
        first = model.generate(**batch, past_key_values=together, max_new_tokens=NEW, do_sample=False)
        more = left_padded([talk.forwards[1][None] for talk in talks])
        mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW, dtype=torch.long), more["attention_mask"]], dim=1)
        mask[1, first.shape[1] - NEW + answered : first.shape[1]] = 0
        turn = {"input_ids": torch.cat([first, more["input_ids"]], dim=1), "attention_mask": mask}
        said = model.generate(**together.next_turn(model, **turn), max_new_tokens=NEW, do_sample=False)
    for place, talk in enumerate(talks):
        with kvcomp.compress(model, recipe, budget=0.4) as alone:
            chat = Chat(model, alone, talk).turn(0, answered if place else NEW).turn(1)
        assert said[place, -NEW:].tolist() == chat.ids[0, -NEW:].tolist()
        check_row(together, place, alone)


def test_chats_in_threads_are_those_of_one_thread():
    """Each thread opens and closes a block of its own; one of them fails."""
    model = tiny_qwen_vl()
    jobs = [(STORED[name], TALKS[place % 2]) for place, name in enumerate(("dense", "second pass", "turned back"))]
    barrier = threading.Barrier(len(jobs) + 1)
    before = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}

    def talk(job) -> list[torch.Tensor]:
        (recipe, budget, overrides), parts = job
        with kvcomp.compress(model, recipe, budget=budget, **overrides) as cache:
            chat = Chat(model, cache, parts)
            for number in turns_of(chat):
                chat.turn(number)
        return chat.logits

    def together(place: int) -> None:
        barrier.wait()
        said[place] = talk(jobs[place])

    def fail() -> None:
        barrier.wait()
        with pytest.raises(kvcomp.InputError), kvcomp.compress(model, "h2o", budget=0.3) as cache:
            Chat(model, cache, TALKS[0]).turn(0).cache.next_turn(model, input_ids=TALKS[0].ids[:, :1])
        failed.append(True)

    alone, failed = [talk(job) for job in jobs], []
    said: dict[int, list[torch.Tensor]] = {}
    threads = [threading.Thread(target=together, args=(place,)) for place in range(len(jobs))]
    threads.append(threading.Thread(target=fail))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [True]
    for place, expected in enumerate(alone):
        assert all(map(torch.equal, said[place], expected))
    after = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert after == before


def test_a_chat_goes_on_in_another_process(tmp_path):
    """The file holds the positions; the new process has never seen the conversation."""
    model = tiny_qwen_vl()
    with kvcomp.compress(model, "flowmm", budget=0.4) as cache:
        chat = Chat(model, cache, TALKS[0]).turn(0)
        cache.save(tmp_path / "cache.safetensors")
        before = {"ids": chat.ids, "pixels": chat.pixels}
        torch.save(before, tmp_path / "chat.pt")
        chat.turn(1)
    script = (
        "import sys, torch, kvcomp\n"
        "from models import tiny_qwen_vl\n"
        "sys.path.insert(0, 'integration')\n"
        "from test_conversations import TALKS, Chat\n"
        "model, folder = tiny_qwen_vl(), sys.argv[1]\n"
        "cache = kvcomp.load_cache(folder + '/cache.safetensors', model)\n"
        "chat = Chat(model, cache, TALKS[0])\n"
        "said = torch.load(folder + '/chat.pt')\n"
        "chat.ids, chat.pixels, chat.forwards = said['ids'], said['pixels'], [None] * 3\n"
        "session = kvcomp.attach(model)\n"
        "print(chat.turn(1).ids.tolist(), cache.layers[1].indices.tolist())\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    assert printed.strip() == f"{chat.ids.tolist()} {cache.layers[1].indices.tolist()}"


@pytest.mark.parametrize("name", [name for name in STORED if name != "at every token"])
def test_questions_share_the_memory_of_their_context(name):
    """Every question starts from the very storages of the snapshot, and none is copied before it is written to."""
    recipe, budget, overrides = STORED[name]
    model, context, questions = tiny_llama(), text_inputs(60)["input_ids"], [row(8, seed=1), row(5, seed=2)]
    session = kvcomp.attach(model)
    cache, fresh = (session.cache(recipe, budget, **overrides) for _ in range(2))

    def storages() -> list[int]:
        pointers = [tensor.untyped_storage().data_ptr() for layer in cache.layers for tensor in memory(layer)]
        assert pointers
        return pointers

    def ask(asked, question: Row) -> torch.Tensor:
        start = asked.get_seq_length()
        positions = torch.arange(start, start + question.ids.shape[1])[None]
        return model(input_ids=question.ids, position_ids=positions, past_key_values=asked).logits

    with torch.no_grad():
        model(input_ids=context, past_key_values=cache)
        snapshot, before = cache.snapshot(), storages()
        first = [(ask(cache, question), cache.restore(snapshot))[0] for question in questions]
        assert storages() == before
        for question, expected in zip(questions, first, strict=True):
            fresh.reset()
            model(input_ids=context, past_key_values=fresh)
            assert torch.equal(ask(fresh, question), expected)
            assert torch.equal(ask(cache, question), expected)
            cache.restore(snapshot)
            assert storages() == before
    session.detach()


def memory(layer) -> list[torch.Tensor]:
    """The tensors that hold a layer's keys and values, and its bookkeeping."""
    packed, coded = layer.storage.packed(), layer.storage.dump()[0]
    held = list(layer.storage.read() if packed is None else (packed.keys, packed.values))
    held = held if packed is not None or not coded else list(coded.values())
    return [*held, *(layer.held_table.tensors() if layer.held_table is not None else ())]


@pytest.mark.parametrize("name", ["dense", "ragged", "second pass", "carried sums", "pairs of layers"])
def test_deferred_chunks_of_a_padded_batch_are_one_prompt(name):
    """The first chunk holds nothing but padding of the shorter row."""
    recipe, budget, overrides = STORED[name]
    model, rows = tiny_llama(), [row(20, 15, 12, 1, 6, seed=1), row(0, 11, 12, 1, 3, seed=2)]
    whole = [Row((torch.cat(one.forwards[:3]), *one.forwards[3:])) for one in rows]
    with kvcomp.compress(model, recipe, budget=budget, defer=True, **overrides) as chunks, torch.no_grad():
        said = feed(model, chunks, rows)
    with kvcomp.compress(model, recipe, budget=budget, **overrides) as cache, torch.no_grad():
        expected = feed(model, cache, whole)
    for seen, one in zip(said[2:4], expected[:2], strict=True):
        torch.testing.assert_close(seen, one, atol=1e-4, rtol=1e-4)
    assert chunks.report().layers[0].tokens == cache.report().layers[0].tokens == (54, 27)


@pytest.mark.parametrize("recipe", ["flowmm", "h2o", "kvzip"])
@pytest.mark.parametrize("budget", [0.4, 1.0])
def test_pictures_may_be_prefilled_in_chunks(recipe, budget):
    """`prefill_chunk_size` of a prompt with pictures, deferred, is the prompt in one piece."""
    model, inputs = tiny_qwen_vl(), row("9i5i7i4", seed=1).until(0)
    settings = {"do_sample": False, "max_new_tokens": 4}
    with kvcomp.compress(model, recipe, budget=budget) as cache:
        expected = model.generate(**inputs, past_key_values=cache, **settings)
    with kvcomp.compress(model, recipe, budget=budget, defer=True) as chunked:
        output = model.generate(**inputs, past_key_values=chunked, prefill_chunk_size=10, **settings)
    assert torch.equal(output, expected)
    assert torch.equal(chunked.layers[2].indices, cache.layers[2].indices)
