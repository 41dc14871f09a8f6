# Predicates about the files of a capability of kind "fs".
#
#     import data.spectrum.lib.paths
#
#     allow if paths.under(input.capability, "/photos")
package spectrum.lib.paths

# under(capability, dir): the capability is about dir or something beneath it.
# "/photos" covers "/photos" and "/photos/2024", and not "/photos-private".
under(capability, dir) if {
	capability.kind == "fs"
	_beneath(capability.resource.path, dir)
}

# in_partition(capability, id): its files are of the partition with that UUID.
in_partition(capability, id) if {
	capability.kind == "fs"
	capability.resource.partition == id
}

# read_only(capability): it asks for nothing but to read.
read_only(capability) if capability.rights == ["read"]

_beneath(_, "/")

_beneath(path, dir) if path == trim_suffix(dir, "/")

_beneath(path, dir) if {
	dir != "/"
	startswith(path, concat("", [trim_suffix(dir, "/"), "/"]))
}
