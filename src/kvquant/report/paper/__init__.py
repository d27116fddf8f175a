"""The paper's generated part: macros, tables and figures made of run directories, and a manifest of where each is from."""
