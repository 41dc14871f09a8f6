# The host's policy: a starter to copy to /etc/spectrum-broker/policy.
#
# The host is asked about every request. What it denies is denied whatever the
# partitions say; its own `allow` is needed only where the requester, the holder
# or the resource belongs to no partition, such as a person at the command line
# or a built-in VM. So this file says two things: what the person may do, and
# what no partition's policy may permit.
package spectrum.grant

import data.spectrum.lib.vms

# The person at the host may ask for anything: the partitions concerned still
# have to allow it.
allow if input.requester.kind == "person"

# A built-in VM gets what the partition that owns the data allows it.
allow if {
	input.requester.kind == "vm"
	vms.built_in(input.holder)
}

# No writing across partitions: one partition's VM must not be able to plant
# anything among another partition's files. Reading is for the owner's policy
# to decide.
deny contains "a VM of one partition may not write to another's files" if {
	input.capability.kind == "fs"
	"write" in input.capability.rights
	not _same_partition
}

# A VM cannot get for another VM what it does not hold itself.
deny contains "a VM may ask for another one only by delegating what it holds" if {
	input.requester.kind == "vm"
	input.requester.vm != input.holder.vm
	input.parent == null
}

# Whatever crosses from one partition to another ends within eight hours,
# however long it was asked for.
limits contains {"ttl_seconds": 28800} if {
	input.capability.kind == "fs"
	not _same_partition
}

_same_partition if input.holder.partition == input.capability.resource.partition
