"""Records -> tokens -> pool -> packed rows. numpy only: importing it starts no device."""
