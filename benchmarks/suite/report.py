def show(ledger, out, readme=False): print(len(ledger.rows))
