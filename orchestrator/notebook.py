"""What a notebook needs: a spec read, a sweep run here, a sweep opened. Functions of ``import fimo``."""
