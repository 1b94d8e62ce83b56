"""A process that lowers programs for another: `python -m recache_compile.compiler.helper`."""

from recache_compile.compiler.side_by_side import serve

if __name__ == "__main__":
    serve()
