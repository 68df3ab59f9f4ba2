"""What a schema promises, from real processes: every answer of the demo pair parses and fits, with speculation on.

The slow one asks a thousand times and compares the acceptance rate with that of free text:
``pytest -m slow -s tests/e2e/test_structured_output.py``.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from outrider.client import Client, Completion, Speculation, StructuredOutput
from rpc.errors import InvalidRequest
from tests.doubles import grammars
from tests.e2e.processes import Up, outrider, running_up

PROMPTS = (
    "import json\n\nrecord = json.loads('",
    "def settings():\n    return ",
    '"""Write one entry of the inventory as JSON."""\nENTRY = ',
    "print(json.dumps(item))\n# ",
)
SCHEMAS = (
    grammars.SCHEMA,
    {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
            "price": {"type": "number", "minimum": 0, "maximum": 99, "multipleOf": 0.25},
            "parent": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/parent"}]},
        },
        "$defs": {
            "parent": {
                "type": "object",
                "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 9}},
                "additionalProperties": False,
            }
        },
        "required": ["id", "price", "parent"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["north", "south", 1, None, {"x": []}]}, "minItems": 2, "maxItems": 5},
)
MAX_TOKENS = 300


@pytest.fixture(scope="module")
def demo() -> Iterator[Up]:
    with running_up() as up:
        yield up


async def ask(client: Client, index: int, *, free: bool = False, plain: bool = False) -> Completion:
    wanted = None if free else StructuredOutput(json_schema=json.dumps(SCHEMAS[index % len(SCHEMAS)]))
    return await client.complete(
        PROMPTS[index // len(SCHEMAS) % len(PROMPTS)],
        max_tokens=60 if free else MAX_TOKENS,
        temperature=(0.0, 0.7, 1.0, 1.3)[index % 4],
        seed=index,
        structured_output=wanted,
        speculation=Speculation(disabled=plain),
    )


async def check_all(up: Up, num_requests: int, concurrency: int = 4) -> list[Completion]:
    gate = asyncio.Semaphore(concurrency)
    async with Client(up.address) as client:

        async def one(index: int) -> Completion:
            async with gate:
                answer = await ask(client, index)
            assert answer.finish_reason == "stop", f"request {index}: {answer.text}"
            jsonschema.validate(json.loads(answer.text), SCHEMAS[index % len(SCHEMAS)])
            return answer

        return await asyncio.gather(*(one(index) for index in range(num_requests)))


def acceptance(answers: list[Completion]) -> float:
    drafted = sum(answer.speculation.num_drafted for answer in answers)
    return sum(answer.speculation.num_accepted for answer in answers) / drafted


async def test_every_answer_fits_its_schema(demo: Up) -> None:
    answers = await check_all(demo, 24)
    assert sum(answer.speculation.num_accepted for answer in answers) > 0
    async with Client(demo.address) as client:
        for index in random.Random(1).sample(range(24), 6):
            assert (await ask(client, index, plain=True)).token_ids == answers[index].token_ids


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_a_thousand_of_a_thousand_fit_and_drafts_are_as_good_as_in_free_text(demo: Up) -> None:
    answers = await check_all(demo, 1000)
    async with Client(demo.address) as client:
        free = [await ask(client, index, free=True) for index in range(100)]
        bound = [await ask(client, index) for index in range(100)]
    rates = acceptance(bound), acceptance(free)
    print(f"\n{len(answers)} answers fit; acceptance {rates[0]:.3f} with a schema, {rates[1]:.3f} in free text")
    assert rates[0] > rates[1] - 0.05


async def test_regex_and_grammar_and_any_object(demo: Up) -> None:
    async with Client(demo.address) as client:
        for kind, grammar in (("regex", grammars.GRAMMARS[1]), ("grammar", grammars.GRAMMARS[2])):
            answer = await client.complete(
                "x = ", max_tokens=200, structured_output=StructuredOutput(**{kind: grammar.text})
            )
            assert grammars.fits(grammar, answer.text)
        answer = await client.complete("x = ", max_tokens=3, structured_output=StructuredOutput(json_object=True))
        assert answer.text.startswith("{")
        assert answer.finish_reason == "length"
        with pytest.raises(InvalidRequest, match=r"structured_output.json_schema: .*nope"):
            await client.complete("x", structured_output=StructuredOutput(json_schema='{"type": "nope"}'))
        with pytest.raises(InvalidRequest, match="says nothing"):
            await client.complete("x", structured_output=StructuredOutput())


def test_the_command_line_reads_schemas_and_says_what_is_wrong(demo: Up, tmp_path: Path) -> None:
    schema, broken = tmp_path / "schema.json", tmp_path / "broken.json"
    schema.write_text(json.dumps(SCHEMAS[0]))
    broken.write_text('{"type": "nope"}')
    common = ("generate", "--address", demo.address, "--max-tokens=200")
    outcome = outrider(*common, f"--json-schema={schema}", "x = ")
    assert outcome.exit_code == 0
    jsonschema.validate(json.loads(outcome.stdout), SCHEMAS[0])
    outcome = outrider(*common, "--regex=[0-9]{3}", "x = ")
    assert outcome.stdout.strip().isdigit()
    for arguments, problem in (
        ((f"--json-schema={broken}",), "structured_output.json_schema"),
        ((f"--json-schema={tmp_path / 'none'}",), "--json-schema"),
        (("--regex=(",), "structured_output.regex"),
        ((f"--json-schema={schema}", "--regex=x"), "give one of them"),
    ):
        outcome = outrider(*common, *arguments, "x = ")
        assert outcome.exit_code == 2
        assert problem in outcome.stderr
        assert "Traceback" not in outcome.stderr
