"""A real MCP server over stdio, started by the tests."""

from mcp.server.mcpserver import MCPServer

server = MCPServer("numbers")


@server.tool()
def product(left: int, right: int) -> int:
    """Multiplies two numbers."""
    return left * right


@server.tool()
def refuses(word: str) -> str:
    """Raises."""
    raise ValueError(f"not {word}")


if __name__ == "__main__":
    server.run("stdio")
