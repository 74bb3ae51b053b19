"""Every page's code runs as it stands there, and prints what the page says."""

import os
import re
import sys

import pytest

from tests.cases.pages import ROOT, PageError, page_names, read_blocks, run_page

# Packages that a page may need and the project's users need not have.
OPTIONAL = {"flax", "orbax", "equinox", "transformers"}


@pytest.mark.parametrize("page", page_names())
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        run_page((ROOT / page).read_text(), page)
    except PageError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name and missing.name.partition(".")[0] in OPTIONAL:
            pytest.skip(str(error))
        raise


# ---- the convention itself

PAGE = """# A page

<!-- run
width = 3
-->

```python
import sys


def double(x):
    return 2 * x


print(double(width))
```

```text
6
```

- in a list:

  ```diff
  @@ -1,2 +1,3 @@
    height = 4
  - print(width + height)
  + area = width * height
  + print(area)
  ```

  ```text
  12
  ```

<!-- not run: it needs a GPU -->
```python
launch()
```

```sh
python -c launch()
```

````python
print('''
```python
wrong(
```
''')
````

More of it.

    ```text
    not the output: something came between
    ```
"""


def test_blocks_of_a_page():
    blocks = read_blocks(PAGE)
    found = [(block.kind, block.line, block.reason, block.output, block.output_line) for block in blocks]
    assert found[:4] == [
        ("run", 4, None, None, None),
        ("python", 8, None, "6\n", 19),
        ("diff", 25, None, "12\n", 33),
        ("python", 38, "it needs a GPU", None, None),
    ]
    lines = PAGE.splitlines()
    for block in blocks:
        assert block.code.splitlines()[-1] in lines[block.line - 1 + len(block.code.splitlines()) - 1]
    assert blocks[2].code == "\nheight = 4\n\narea = width * height\nprint(area)"


def test_text_is_compared_directly_after_code_only():
    page = "```python\nprint(1)\n```\n{}\n```text\n2\n```\n"
    run_page(page.format("More of it."), "page.md")
    for between in ("", "\n\n"):
        with pytest.raises(PageError, match=r"^page.md:\d: the page shows\n    2\nwhere its code prints\n    1\n$"):
            run_page(page.format(between), "page.md")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("6\n", "7\n", r"page.md:19: the page shows\n    7\nwhere its code prints\n    6\n"),
        ("6\n", "6 \n", r"page.md:19: the page shows\n    6 \nwhere"),
        ("  12\n", "  7\n", r"page.md:33: the page shows\n    7\nwhere its code prints\n    12\n"),
        ("width = 3", "width = wrong", r"page.md:4: NameError: name 'wrong' is not defined"),
        ("return 2 * x", "return 2 * y", r"page.md:12: NameError: name 'y' is not defined"),
        ("return 2 * x", "return (2", r"page.md:12: SyntaxError: '\(' was never closed"),
        ("+ print(area)", "+ print(volume)", r"page.md:29: NameError: name 'volume' is not defined"),
        ("launch", "print(1/0) #", None),
        ("double(width)", "'nothing', file=sys.stderr", r"page.md:19: the page shows\n    6\nwhere .*\n    nothing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_page_and_line(old, new, message):
    run_page(PAGE, "page.md")
    assert old in PAGE
    changed = PAGE.replace(old, new, 1)
    if message is None:
        run_page(changed, "page.md")
        return
    with pytest.raises(PageError, match=f"^{message}"):
        run_page(changed, "page.md")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```python\n1", "page:1: the fence has no end"),
        ("a\n<!-- run\n1\n", "page:2: the comment with code has no end"),
        ("<!-- not run: later -->\n\n```python\n1\n```", "page:1: `not run` must be directly above a block"),
        ("<!-- not run: later -->", "page:1: `not run` must be directly above a block"),
        ("<!-- not run: -->\n```python\n1\n```", "page:1: `not run` must give a reason"),
        ("<!-- run x = 1 -->", "page:1: must be `<!-- run`, alone on its line"),
        ("<!-- not run -->\n```python\n1\n```", "page:1: must be `<!-- run`, alone on its line"),
        ("```py\n1\n```", "page:1: a block of Python is fenced as `python`, got 'py'"),
        ("\n```diff\n+ a\nb\n```", "page:4: a line of a diff begins with"),
    ],
)
def test_what_is_no_page_is_an_error(page, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_blocks(page)


def test_nothing_is_left_of_a_page():
    import jax
    import numpy as np
    import torch

    def state():
        return (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_default_device(),
            torch.initial_seed(),
            repr(torch.tensor(1 / 3)),
            repr(np.float32(1 / 3) * np.ones(1)),
            jax.config.jax_numpy_rank_promotion,
            jax.config.jax_enable_x64,
            jax.sharding.get_abstract_mesh(),
            dict(os.environ),
            [sys.modules.get(name) for name in ("page", "nothing", "nothing.inner", "json")],
        )

    before = state()
    code = """<!-- run
import os, sys, types
import jax, numpy as np, torch
import jax.numpy as jnp
assert (jnp.ones((2, 3)) + jnp.ones(3)).sum() == 12  # not an error, as it is in other tests
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.set_grad_enabled(False)
torch.manual_seed(3)
torch.set_printoptions(precision=2)
np.set_printoptions(precision=2)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "warn")
jax.set_mesh(jax.make_mesh((4,), ("tp",)))
os.environ["NOTHING"] = "1"
sys.modules["nothing"] = types.ModuleType("nothing")
sys.modules["nothing.inner"] = types.ModuleType("nothing.inner")
sys.modules["json"] = types.ModuleType("json")
-->
"""
    run_page(code, "page.md")
    assert state() == before
    with pytest.raises(PageError, match=r"page.md:21: ZeroDivisionError"):
        run_page(code + "```python\n1 / 0\n```\n", "page.md")
    assert state() == before
