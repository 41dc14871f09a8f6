package spectrum.lib.paths_test

import data.spectrum.lib.paths

fs(path) := {
	"kind": "fs",
	"resource": {"partition": "11111111-1111-4111-8111-111111111111", "path": path},
	"rights": ["read"],
}

test_under_itself if paths.under(fs("/photos"), "/photos")

test_under_child if paths.under(fs("/photos/2024"), "/photos")

test_under_trailing_slash if paths.under(fs("/photos/2024"), "/photos/")

test_under_root if paths.under(fs("/photos"), "/")

test_not_under_sibling_with_same_prefix if not paths.under(fs("/photos-private"), "/photos")

test_not_under_parent if not paths.under(fs("/"), "/photos")

test_not_under_other_kind if not paths.under({"kind": "net", "resource": {}, "rights": []}, "/")

test_in_partition if paths.in_partition(fs("/a"), "11111111-1111-4111-8111-111111111111")

test_not_in_partition if not paths.in_partition(fs("/a"), "22222222-2222-4222-8222-222222222222")

test_read_only if paths.read_only(fs("/a"))

test_not_read_only if not paths.read_only(object.union(fs("/a"), {"rights": ["read", "write"]}))
