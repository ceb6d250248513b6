"""A real MCP server, started by the tests: over stdio, or over HTTP at a port of 127.0.0.1."""

import sys

from mcp.server.mcpserver import Image, MCPServer

server = MCPServer("numbers")


@server.tool()
def product(left: int, right: int) -> int:
    """Multiplies two numbers."""
    return left * right


@server.tool()
def refuses(word: str) -> str:
    """Raises."""
    raise ValueError(f"not {word}")


@server.tool()
def draws(word: str) -> Image:
    """Answers with a picture."""
    return Image(data=word.encode(), format="png")


if __name__ == "__main__":
    if sys.argv[1:]:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
