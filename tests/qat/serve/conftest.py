"""One artifact, engine and server for all tests of the API."""

import pytest

from qat.serve.engine import Engine, EngineOptions
from qat.serve.prompts import Prompts
from tests.qat.serve.serving import demo_artifact, running

MAX_SEQUENCES = 4
"""Few, so that a queue is easily had."""


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The artifact of the demo model, with a chat template."""
    return demo_artifact(tmp_path_factory.mktemp("served") / "demo")


@pytest.fixture(scope="session")
def plain_demo(tmp_path_factory):
    """The same without a chat template."""
    return demo_artifact(tmp_path_factory.mktemp("served") / "plain", chat_template=None)


@pytest.fixture(scope="session")
def engine(demo):
    made = Engine(demo, EngineOptions(max_sequences=MAX_SEQUENCES))
    yield made
    made.close()


@pytest.fixture(scope="session")
def prompts(demo):
    made = Prompts(demo)
    yield made
    made.close()


@pytest.fixture(scope="session")
def server(engine, prompts):
    with running(engine, prompts) as made:
        yield made


@pytest.fixture(scope="session")
def client(server):
    with server.client() as made:
        yield made
