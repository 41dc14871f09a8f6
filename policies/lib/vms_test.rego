package spectrum.lib.vms_test

import data.spectrum.lib.vms

holder := {
	"vm": "aaaaaaaa-1111-4111-8111-111111111111",
	"partition": "11111111-1111-4111-8111-111111111111",
	"disposable": false,
	"ancestors": [],
	"own": {"names": ["editor"], "labels": {"role": "photo-editor"}},
}

disposable := {
	"vm": "bbbbbbbb-1111-4111-8111-111111111111",
	"partition": "11111111-1111-4111-8111-111111111111",
	"disposable": true,
	"ancestors": ["cccccccc-1111-4111-8111-111111111111", holder.vm],
}

test_labelled if vms.labelled(holder, "role", "photo-editor")

test_not_labelled if not vms.labelled(holder, "role", "browser")

test_not_labelled_without_own if not vms.labelled(disposable, "role", "photo-editor")

test_named if vms.named(holder, "editor")

test_not_named if not vms.named(holder, "browser")

test_disposable_of_grandparent if vms.disposable_of(disposable, holder.vm)

test_not_disposable_of_stranger if not vms.disposable_of(disposable, "dddddddd-1111-4111-8111-111111111111")

test_ordinary_vm_is_nobodys_disposable if {
	not vms.disposable_of(object.union(disposable, {"disposable": false}), holder.vm)
}

test_of_partition if vms.of_partition(holder, "11111111-1111-4111-8111-111111111111")

test_built_in if vms.built_in(object.union(holder, {"partition": null}))

test_not_built_in if not vms.built_in(holder)
