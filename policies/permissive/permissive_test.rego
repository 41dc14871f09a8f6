package spectrum.grant_test

import data.spectrum.grant

here := "11111111-1111-4111-8111-111111111111"

elsewhere := "22222222-2222-4222-8222-222222222222"

request := {
	"action": "grant",
	"now": "2026-03-02T10:00:00+01:00",
	"requester": {"kind": "person", "uid": 1000},
	"holder": {
		"vm": "aaaaaaaa-1111-4111-8111-111111111111",
		"partition": here,
		"disposable": false,
		"ancestors": [],
		"own": {"names": ["editor"], "labels": {}},
	},
	"capability": {
		"kind": "fs",
		"resource": {"partition": here, "path": "/letters"},
		"rights": ["read", "write"],
	},
	"parent": null,
	"partition": here,
}

# A VM of another partition; what it says of itself plays no part.
stranger := object.union(request, {"holder": {
	"vm": "bbbbbbbb-1111-4111-8111-111111111111",
	"partition": elsewhere,
	"disposable": false,
	"ancestors": [],
}})

public := {"capability": {"resource": {"path": "/public/menu.pdf"}, "rights": ["read"]}}

test_own_vm_may_write if {
	grant.allow with input as request
	count(grant.deny) == 0 with input as request
	count(grant.limits) == 0 with input as request
}

test_own_vm_may_ask_elsewhere if {
	grant.allow with input as object.union(request, {"capability": {"resource": {"partition": elsewhere}}})
}

test_stranger_gets_nothing_private if not grant.allow with input as stranger

test_stranger_may_read_public if {
	grant.allow with input as object.union(stranger, public)
	grant.limits == {{"ttl_seconds": 36000}} with input as object.union(stranger, public)
}

test_stranger_may_not_write_public if {
	write := object.union(object.union(stranger, public), {"capability": {"rights": ["read", "write"]}})
	not grant.allow with input as write
}

test_disposable_may_not_write if {
	disposable := object.union(request, {"holder": {"disposable": true}})
	grant.deny == {"a disposable may not change files"} with input as disposable
}
