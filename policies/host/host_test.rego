package spectrum.grant_test

import data.spectrum.grant

work := "11111111-1111-4111-8111-111111111111"

home := "22222222-2222-4222-8222-222222222222"

vm := "aaaaaaaa-1111-4111-8111-111111111111"

request := {
	"action": "grant",
	"now": "2026-03-02T10:00:00+01:00",
	"requester": {"kind": "person", "uid": 1000},
	"holder": {"vm": vm, "partition": work, "disposable": false, "ancestors": []},
	"capability": {
		"kind": "fs",
		"resource": {"partition": work, "path": "/photos"},
		"rights": ["read"],
	},
	"parent": null,
	"partition": "host",
}

across := object.union(request, {"holder": {"partition": home}})

write := {"capability": {"rights": ["read", "write"]}}

test_person_is_allowed if {
	grant.allow with input as request
	count(grant.deny) == 0 with input as request
	count(grant.limits) == 0 with input as request
}

test_vm_for_itself_is_left_to_the_partitions if {
	own := object.union(request, {"action": "request", "requester": {"kind": "vm", "vm": vm}})
	not grant.allow with input as own
	count(grant.deny) == 0 with input as own
}

test_built_in_vm_is_allowed if {
	grant.allow with input as object.union(request, {
		"requester": {"kind": "vm", "vm": vm},
		"holder": {"partition": null},
	})
}

test_reading_across_is_limited if {
	count(grant.deny) == 0 with input as across
	grant.limits == {{"ttl_seconds": 28800}} with input as across
}

test_writing_at_home_is_fine if {
	count(grant.deny) == 0 with input as object.union(request, write)
}

test_writing_across_is_denied if {
	grant.deny == {"a VM of one partition may not write to another's files"} with input as object.union(across, write)
}

test_asking_for_another_vm_is_denied if {
	other := object.union(request, {"requester": {"kind": "vm", "vm": "bbbbbbbb-1111-4111-8111-111111111111"}})
	grant.deny == {"a VM may ask for another one only by delegating what it holds"} with input as other
}

test_delegating_is_not_denied if {
	other := object.union(request, {
		"action": "delegate",
		"requester": {"kind": "vm", "vm": "bbbbbbbb-1111-4111-8111-111111111111"},
		"parent": request.capability,
	})
	count(grant.deny) == 0 with input as other
}
