# Predicates about the VM that would hold a capability.
#
#     import data.spectrum.lib.vms
#
#     allow if vms.labelled(input.holder, "role", "photo-editor")
package spectrum.lib.vms

# labelled(holder, name, value): the holder's definition carries that label.
# Only the holder's own partition is shown its labels; for every other engine
# this never holds.
labelled(holder, name, value) if holder.own.labels[name] == value

# named(holder, alias): the holder's definition has that alias. Prefer labels:
# a rename would change what this says.
named(holder, alias) if alias in holder.own.names

# disposable_of(holder, vm): the holder is a disposable that this VM spawned,
# directly or through other disposables.
disposable_of(holder, vm) if {
	holder.disposable
	vm in holder.ancestors
}

# of_partition(holder, id): the holder belongs to that partition.
of_partition(holder, id) if holder.partition == id

# built_in(holder): the holder belongs to the host.
built_in(holder) if holder.partition == null
