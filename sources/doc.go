// Package sources finds partitions and the VM definitions and policies in
// them, and opens what grants and VMs need by descriptor.
//
// Its laws:
//
//   - What is in a partition is hostile. Every name beneath a partition's root
//     is resolved by openat2 with RESOLVE_BENEATH, NO_SYMLINKS, NO_MAGICLINKS
//     and NO_XDEV; what was found is first held as O_PATH, looked at, and only
//     then opened for reading, so that no device, FIFO or socket is ever
//     opened. Counts and sizes are bounded before anything is read.
//   - What is handed out is the opened descriptor, never a name to be opened
//     again by someone else.
//   - A grant's path is resolved beneath files/, so that none reaches svc/.
//   - A wrong definition is a [Problem] that names its file and the reason. It
//     disturbs no other definition and no other partition.
//   - No descriptor into a partition is kept beyond one call, other than those
//     that are returned: a partition can be unmounted at any time.
//   - The built-in directory is the host's own, and symlinks in it are
//     followed: images of an operating system are often built of them.
package sources
