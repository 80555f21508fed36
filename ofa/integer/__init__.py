"""Integer-only networks: data (`net`), arithmetic (`fixed`), a reference (`run`), two sources, and a memory plan."""
