package capabilities

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/uuid"
)

// Rights of the fs kind. Writing without reading is not offered.
const (
	RightRead  = "read"
	RightWrite = "write"
)

const fsName = "fs"

var (
	fsReadOnly  = Rights{RightRead}
	fsReadWrite = Rights{RightRead, RightWrite}
)

// FS is the kind of capability over a directory, or one file, of a user
// partition. Its spelling is "fs:ro:<partition>:/path" or "fs:rw:…", with the
// path last and verbatim. A directory covers all that is beneath it.
type FS struct{}

// FSResource is a place in a user partition's files.
type FSResource struct {
	PartitionID uuid.UUID `json:"partition"`
	Path        RelPath   `json:"path"`
}

// Partition is the user partition that holds the place.
func (r FSResource) Partition() (uuid.UUID, bool) { return r.PartitionID, true }

// String is "<partition-uuid>:/path".
func (r FSResource) String() string { return r.PartitionID.String() + ":" + r.Path.String() }

func (r FSResource) spell(rights Rights) string {
	mode := "ro"
	if rights.Has(RightWrite) {
		mode = "rw"
	}
	return mode + ":" + r.String()
}

// fsWire is the resource in a token: {1: partition (16 bytes), 2: path (text)}.
type fsWire struct {
	Partition []byte `cbor:"1,keyasint"`
	Path      string `cbor:"2,keyasint"`
}

// MarshalCBOR is the deterministic encoding that FS.DecodeCBOR reads.
func (r FSResource) MarshalCBOR() ([]byte, error) {
	if r.Path.IsZero() || r.PartitionID == uuid.Nil {
		return nil, fmt.Errorf("%w: no partition or no path", ErrResource)
	}
	return encMode.Marshal(fsWire{Partition: r.PartitionID[:], Path: r.Path.s})
}

// NewFS makes a capability of the fs kind.
func NewFS(partition uuid.UUID, path RelPath, rights Rights) (Capability, error) {
	if partition == uuid.Nil {
		return Capability{}, fmt.Errorf("%w: no partition", ErrResource)
	}
	if path.IsZero() {
		return Capability{}, fmt.Errorf("%w: no path", ErrResource)
	}
	if !rights.Equal(fsReadOnly) && !rights.Equal(fsReadWrite) {
		return Capability{}, fmt.Errorf(`%w: fs has ["read"] and ["read","write"], not %s`,
			ErrRights, excerpt(strings.Join(rights, ",")))
	}
	return Capability{
		Kind:     fsName,
		Resource: FSResource{PartitionID: partition, Path: path},
		Rights:   slices.Clone(rights), // the value must not change with its maker's slice
	}, nil
}

// Name is "fs".
func (FS) Name() string { return fsName }

// Parse reads "fs:ro:<partition>:/path". The partition is a UUID, or a name
// for the Resolver.
func (FS) Parse(spelling string, r Resolver) (Capability, error) {
	parts := strings.SplitN(spelling, ":", 4)
	if len(parts) != 4 || parts[0] != fsName {
		return Capability{}, fmt.Errorf("%w: %s: must be fs:ro:<partition>:/path or fs:rw:<partition>:/path",
			ErrSpelling, excerpt(spelling))
	}
	var rights Rights
	switch parts[1] {
	case "ro":
		rights = fsReadOnly
	case "rw":
		rights = fsReadWrite
	default:
		return Capability{}, fmt.Errorf("%w: %s: must say ro or rw, not %s",
			ErrSpelling, excerpt(spelling), excerpt(parts[1]))
	}
	// The path first: its faults are the caller's own, while an answer about
	// the name says something about the host.
	path, err := ParseRelPath(parts[3])
	if err != nil {
		return Capability{}, err
	}
	partition, err := resolvePartition(parts[2], r)
	if err != nil {
		return Capability{}, err
	}
	return NewFS(partition, path, rights)
}

// DecodeJSON reads {"partition":"<uuid>","path":"/a/b"}.
func (FS) DecodeJSON(resource json.RawMessage, rights Rights) (Capability, error) {
	fields, err := strictObject(resource, "partition", "path")
	if err != nil {
		return Capability{}, fmt.Errorf("resource: %w", err)
	}
	text, err := strictString(fields["partition"])
	if err != nil {
		return Capability{}, fmt.Errorf("partition: %w", err)
	}
	partition, ok := canonicalUUID(text)
	if !ok {
		return Capability{}, fmt.Errorf("%w: partition %s is not a UUID in its canonical form", ErrResource, excerpt(text))
	}
	spelt, err := strictString(fields["path"])
	if err != nil {
		return Capability{}, fmt.Errorf("path: %w", err)
	}
	path, err := ParseRelPath(spelt)
	if err != nil {
		return Capability{}, err
	}
	return NewFS(partition, path, rights)
}

// DecodeCBOR reads what EncodeCBOR writes.
func (FS) DecodeCBOR(resource cbor.RawMessage, rights Rights) (Capability, error) {
	var w fsWire
	if err := decMode.Unmarshal(resource, &w); err != nil {
		return Capability{}, fmt.Errorf("%w: resource: %w", ErrEncoding, err)
	}
	partition, err := uuid.FromBytes(w.Partition)
	if err != nil {
		return Capability{}, fmt.Errorf("%w: partition is not 16 bytes", ErrResource)
	}
	path, err := ParseRelPath(w.Path)
	if err != nil {
		return Capability{}, err
	}
	return NewFS(partition, path, rights)
}

// EncodeCBOR writes {1: partition, 2: path}.
func (FS) EncodeCBOR(r Resource) ([]byte, error) {
	f, ok := r.(FSResource)
	if !ok {
		return nil, fmt.Errorf("%w: %T", ErrResource, r)
	}
	return f.MarshalCBOR()
}

// Covers tells whether child is in the same partition, at or beneath parent's
// path, with no right that parent lacks.
func (FS) Covers(parent, child Capability) bool {
	p, ok := fsOf(parent)
	if !ok {
		return false
	}
	c, ok := fsOf(child)
	return ok && p.PartitionID == c.PartitionID && p.Path.Contains(c.Path) && child.Rights.SubsetOf(parent.Rights)
}

// Overlaps tells whether one's path is at or beneath the other's, in the same
// partition, and they share a right.
func (FS) Overlaps(a, b Capability) bool {
	x, ok := fsOf(a)
	if !ok {
		return false
	}
	y, ok := fsOf(b)
	return ok && x.PartitionID == y.PartitionID && (x.Path.Contains(y.Path) || y.Path.Contains(x.Path)) &&
		slices.ContainsFunc(a.Rights, b.Rights.Has)
}

// Attenuate leaves the place and takes rights.
func (FS) Attenuate(c Capability, n Narrowing) (Capability, error) {
	r, ok := fsOf(c)
	if !ok {
		return Capability{}, fmt.Errorf("%w: %s", ErrResource, c)
	}
	if n.ReadOnly {
		return NewFS(r.PartitionID, r.Path, fsReadOnly)
	}
	return c, nil
}

// Use is what is attached at once, for as long as the VM's run goes on: what a
// guest reads through it is not counted.
func (FS) Use() string { return "one attachment of the share to a run of its VM" }

// fsOf is the resource of a valid capability of this kind.
func fsOf(c Capability) (FSResource, bool) {
	r, ok := c.Resource.(FSResource)
	if !ok || c.Kind != fsName || r.PartitionID == uuid.Nil || r.Path.IsZero() {
		return FSResource{}, false
	}
	return r, c.Rights.Equal(fsReadOnly) || c.Rights.Equal(fsReadWrite)
}
