"""x"""
def missing(): return []
def open_pairs(): return []
