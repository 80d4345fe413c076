"""Run a recipe: ``python train.py recipe=NAME key=value ...``; without arguments, list them."""

import sys
from pathlib import Path

import recipes
from qat import config
from qat.errors import UserError, resumable, run_main

USAGE = f"""usage: python train.py recipe=NAME [key=value ...]

recipes:
{recipes.listing()}

  python train.py recipe=NAME --help          every key of a recipe: type, default, meaning
  python train.py recipe=NAME dry_run=true    what would be done, without training
  python train.py recipe=NAME resume=RUN_DIR  continue an interrupted run"""


def _value_of(key: str, words: list[str]) -> str | None:
    """Value of the word ``key=value``; None where it is absent, empty or null."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    return values[0] if values and values[0] not in ("", "null", "~") else None


def run(argv: list[str]) -> None:
    """Do what the command line says; see `USAGE`."""
    words = [word for word in argv if word not in ("--help", "-h")]
    name, resume = _value_of("recipe", words), _value_of("resume", words)
    if name is None and resume is not None:
        name = config.saved_recipe(Path(resume))
    if name is None:
        for word in words:
            config.split_word(word)
        if words:
            raise UserError(f"no recipe given; add recipe=NAME. There are:\n{recipes.listing()}")
        print(USAGE)
        return
    recipe = recipes.find(name)
    schema, files = recipe.schema(), [recipe.config_file]
    if len(words) < len(argv):
        title = f"{name}: {recipe.summary}\n\npython train.py recipe={name} [key=value ...]"
        print(config.help_text(schema, title, files, argv=[f"recipe={name}"]))
    elif resume is not None:
        again = f"python train.py recipe={name} resume={resume}"
        with resumable(Path(resume), again):
            recipe.run(config.load_resume(schema, words, Path(resume), recipes.CONFIGS))
    else:
        recipe.run(config.load(schema, words, files, recipes.CONFIGS))


if __name__ == "__main__":
    sys.exit(run_main(lambda: run(sys.argv[1:])))
