package sources

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/uuid"
)

// HostPath is a path on the host, as the host's processes see it. It is a type
// of its own so that it cannot be taken for a path inside a partition, which
// is a capabilities.RelPath.
type HostPath string

func (p HostPath) String() string { return string(p) }

// Join is p with names beneath it.
func (p HostPath) Join(names ...string) HostPath {
	return HostPath(filepath.Join(append([]string{string(p)}, names...)...))
}

// Options are what a scan looks at.
type Options struct {
	// Builtin is the directory of built-in definitions, one directory for
	// each; "" is none. The host owns it: it alone may give system roles.
	Builtin HostPath
	// Partitions is the directory under which the system mounts user
	// partitions, one directory for each, named by its UUID; "" is none.
	Partitions HostPath
	// KnownIDs tells the UUID that the ledger keeps for a definition whose
	// partition could not be written when it was first seen. The zero
	// partition is the built-in directory. Nil knows none.
	KnownIDs func(partition uuid.UUID, alias string) (uuid.UUID, bool)
	// BoundTo tells the partition that first presented a VM's UUID. Another
	// partition that presents it is refused. Nil knows none.
	BoundTo func(vm uuid.UUID) (partition uuid.UUID, bound bool)
	// Log hears of definitions that got their UUID. Nil is silence.
	Log *slog.Logger
}

// Inventory is what a scan found. Its lists are ordered: partitions by UUID,
// definitions by partition (built-in ones first) and alias.
type Inventory struct {
	Partitions  []Partition
	Definitions []Definition
	Problems    []Problem
}

// Problem is something that a scan refused.
type Problem struct {
	Partition  uuid.UUID // zero: the built-in directory, or no partition's
	Definition string    // the alias; empty: not about one definition
	File       HostPath
	Line       int // from 1; 0: the whole file
	Reason     string
}

func (p Problem) String() string {
	if p.Line > 0 {
		return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Reason)
	}
	return fmt.Sprintf("%s: %s", p.File, p.Reason)
}

// Partition is a user-data partition that is mounted.
type Partition struct {
	ID  uuid.UUID
	Dir HostPath // its root
	// OwnerUID and OwnerGID own files/ (the root, if there is no files/): to
	// them belongs what a guest creates.
	OwnerUID, OwnerGID uint32
	Writable           bool // not mounted read-only
}

// Definition describes a VM.
type Definition struct {
	ID        uuid.UUID
	Partition uuid.UUID // zero: built-in
	// Unwritten tells that ID could not be written beside the definition, so
	// that only the ledger keeps it.
	Unwritten bool
	Alias     string   // the directory's name
	Aliases   []string // Alias first
	MemoryMiB int
	VCPUs     int
	Role      string // "app", or, in built-in definitions only, "net" or "usb"
	Labels    map[string]string
	Template  bool
	Cmdline   string // of the kernel; may be empty
	Grants    []DeclaredGrant
	Dir       HostPath
}

// BuiltIn tells whether the definition belongs to no partition.
func (d Definition) BuiltIn() bool { return d.Partition == uuid.Nil }

// DeclaredGrant is a grant that is requested at every start of a VM. Its
// capability is not parsed here. In it, "self" stands for the definition's own
// partition.
type DeclaredGrant struct {
	Capability string
	TTLSeconds int64  // 0: until the VM's exit
	Label      string // may be empty
}

// Roles of a VM.
const (
	RoleApp = "app"
	RoleNet = "net"
	RoleUSB = "usb"
)

// Opened is a directory or a regular file beneath a partition's files/, held
// as O_PATH: it can be bound and looked at, not read. Whoever got it closes it.
type Opened struct {
	file  *os.File
	isDir bool
}

// File is the descriptor. Closing Opened closes it.
func (o *Opened) File() *os.File { return o.file }

// IsDir tells a directory from a regular file.
func (o *Opened) IsDir() bool { return o.isDir }

// Name is the base name under which it was opened, "files" for all of files/.
func (o *Opened) Name() string { return filepath.Base(o.file.Name()) }

// Close closes the descriptor.
func (o *Opened) Close() error { return o.file.Close() }

// Boot is what a VM starts from, opened for reading. Whoever got it closes it.
type Boot struct {
	Kernel *os.File
	Initrd *os.File // nil: none
	Disks  []Disk   // ordered by name
}

// Disk is a raw image. Images in a definition are never written.
type Disk struct {
	Name     string // base name, "root.img"
	File     *os.File
	ReadOnly bool
}

// Close closes all of it.
func (b *Boot) Close() {
	for _, f := range []*os.File{b.Kernel, b.Initrd} {
		if f != nil {
			_ = f.Close()
		}
	}
	for _, d := range b.Disks {
		_ = d.File.Close()
	}
}

// shown is a hostile name as it may stand in a message: without control
// characters, and short.
func shown(name string) string {
	const most = 80
	if len(name) > most {
		name = strings.ToValidUTF8(name[:most], "") + "…"
	}
	q := fmt.Sprintf("%q", name)
	if q == `"`+name+`"` {
		return name
	}
	return q
}
