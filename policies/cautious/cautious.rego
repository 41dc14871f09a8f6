# A cautious partition: a starter to copy to svc/policy of a partition whose
# files matter. Nothing is allowed but what is listed, to read, for a while.
#
# The list is svc/policy/data.json (or data.yaml), which this policy sees as
# data.partition:
#
#     {"readers": {"photo-editor": ["/photos"], "mail": ["/attachments"]}}
#
# reads: a VM of this partition whose definition carries the label
# `app = "photo-editor"` may read /photos and what is beneath it.
package spectrum.grant

import data.spectrum.lib.paths

# Look-ups by key stay fast however long the list is: first the label, then the
# few directories listed for it.
allow if {
	input.capability.kind == "fs"
	paths.in_partition(input.capability, input.partition)
	some dir in data.partition.readers[input.holder.own.labels.app]
	paths.under(input.capability, dir)
}

# To change files is never right here, whatever the rules above come to say.
deny contains "the files of this partition are read-only" if {
	input.capability.kind == "fs"
	input.capability.resource.partition == input.partition
	"write" in input.capability.rights
}

# A VM of another partition has no business here. This partition is not shown
# its labels, so no `allow` could hold for it either; the reason is clearer.
deny contains "only VMs of this partition may have its files" if {
	input.capability.kind == "fs"
	input.capability.resource.partition == input.partition
	input.holder.partition != input.partition
}

# An hour, and no handing on.
limits contains {"ttl_seconds": 3600, "read_only": true, "max_depth": 0}
