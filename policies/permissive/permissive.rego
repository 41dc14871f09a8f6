# A permissive partition: a starter to copy to svc/policy of a partition whose
# VMs you trust with each other's files. Its own VMs may have all of its files
# and may ask for files elsewhere; others may read what is in /public.
package spectrum.grant

import data.spectrum.lib.paths
import data.spectrum.lib.vms

# This partition's VMs: all files they ask for. If the files are another
# partition's, that partition has to allow it too. The comparison of the kind
# with a constant comes first: it lets OPA skip the rule by an index.
allow if {
	input.capability.kind == "fs"
	vms.of_partition(input.holder, input.partition)
}

# Everybody else: to read, and only what was put there for them.
allow if {
	input.capability.kind == "fs"
	paths.in_partition(input.capability, input.partition)
	paths.under(input.capability, "/public")
	paths.read_only(input.capability)
}

# A disposable exists to open what is not trusted; it gets no way to change
# anything.
deny contains "a disposable may not change files" if {
	input.holder.disposable
	"write" in input.capability.rights
}

# What others get ends with the working day.
limits contains {"ttl_seconds": 36000} if input.holder.partition != input.partition
