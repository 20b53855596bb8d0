"""Would it help me? Steps predicted from what is measured here."""
