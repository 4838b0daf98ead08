"""Services, as the gateway runs them: worker processes that execute users' code, and the calls that wait for them."""
