// Package powercut is a disk that forgets, as real ones do: a file system in
// memory, served over FUSE, that keeps what is durable apart from what is only
// written, and loses the second when the power is cut. It can also be full,
// read-only, or fail in the ways that disks fail.
//
// # What is durable
//
//   - The data, size and mode of a file: what fsync or fdatasync of that file
//     has seen (fdatasync: not the mode). Nothing else makes them durable: not
//     close, not sync of another file, not time.
//   - A name (create, mkdir, link, rename, unlink): what fsync of the directory
//     that holds it has seen. fsync of the file does not, although some file
//     systems are kinder.
//   - A file whose name is durable and which never was fsynced is there, and
//     empty.
//
// Names change one after the other: of the changes of one directory that were
// not synced, those that survive are the first ones. A rename is one change.
// Between directories a rename is refused with EXDEV, as between file systems.
//
// # Where the kernel comes in
//
// Files are opened for direct I/O: every read and write of a program is one of
// this file system, when it is made, and nothing is kept in the kernel's page
// cache. What is mapped into memory cannot be direct: the index that SQLite
// shares (a name that ends in "-shm") goes through the page cache, written back
// whenever the kernel likes. Such files count as scratch: they take part in no
// fault, are not counted, and nothing of them survives a power cut but their
// name. Names and attributes are never cached. Locks are the kernel's.
//
// A program that maps files must not be the process that serves them: a page
// fault holds up the Go scheduler that would answer it.
package powercut
