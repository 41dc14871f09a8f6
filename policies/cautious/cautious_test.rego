package spectrum.grant_test

import data.spectrum.grant

here := "11111111-1111-4111-8111-111111111111"

request := {
	"action": "grant",
	"now": "2026-03-02T10:00:00+01:00",
	"requester": {"kind": "person", "uid": 1000},
	"holder": {
		"vm": "aaaaaaaa-1111-4111-8111-111111111111",
		"partition": here,
		"disposable": false,
		"ancestors": [],
		"own": {"names": ["editor"], "labels": {"app": "photo-editor"}},
	},
	"capability": {
		"kind": "fs",
		"resource": {"partition": here, "path": "/photos/2024"},
		"rights": ["read"],
	},
	"parent": null,
	"partition": here,
}

readers := {"photo-editor": ["/photos"]}

test_listed_reader_is_allowed if {
	grant.allow with input as request with data.partition.readers as readers
	count(grant.deny) == 0 with input as request
}

test_other_directory_is_not_allowed if {
	other := object.union(request, {"capability": {"resource": {"path": "/letters"}}})
	not grant.allow with input as other with data.partition.readers as readers
}

test_unlisted_label_is_not_allowed if {
	other := object.union(request, {"holder": {"own": {"labels": {"app": "browser"}}}})
	not grant.allow with input as other with data.partition.readers as readers
}

test_without_a_list_nothing_is_allowed if {
	not grant.allow with input as request
}

test_writing_is_denied if {
	write := object.union(request, {"capability": {"rights": ["read", "write"]}})
	grant.deny == {"the files of this partition are read-only"} with input as write
}

test_stranger_is_denied if {
	stranger := object.union(request, {"holder": {"partition": "22222222-2222-4222-8222-222222222222"}})
	grant.deny == {"only VMs of this partition may have its files"} with input as stranger
}

test_files_elsewhere_are_not_this_partitions_to_deny if {
	elsewhere := object.union(request, {"capability": {
		"resource": {"partition": "22222222-2222-4222-8222-222222222222"},
		"rights": ["read", "write"],
	}})
	count(grant.deny) == 0 with input as elsewhere
	not grant.allow with input as elsewhere with data.partition.readers as readers
}

test_limits if {
	grant.limits == {{"ttl_seconds": 3600, "read_only": true, "max_depth": 0}} with input as request
}
