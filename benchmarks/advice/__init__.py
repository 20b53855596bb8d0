"""Is ``thinwire.advise`` right?"""
