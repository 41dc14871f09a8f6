package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"spectrum-os.org/broker/capabilities"
)

// recordVersion is the first byte of every record.
const recordVersion = 1

// maxRecord bounds a record, in bytes: a longer one is neither stored nor read.
const maxRecord = 1 << 20

// hashDomain keeps a record's hash from being one of anything else.
const hashDomain = "spectrum-broker ledger event\x00"

// What the bits of a record's flags say is present.
const (
	hasGrant = 1 << iota
	hasVM
	hasPartition
	hasUID
	hasActorVM
	allEventFlags = 1<<iota - 1
)

// The encodings of an event's data.
const (
	dataNone    = 0
	dataJSON    = 1
	dataRequest = 2
	dataCarried = 3
)

// And of a request's flags.
const (
	reqParent = 1 << iota
	reqResource
	reqDeadline
	reqMaxDepth
	reqMaxUses
	reqPersist
	reqDeclared
	allRequestFlags = 1<<iota - 1
)

var errRecord = errors.New("not the canonical form of an event")

// entry is a decoded record. Its slices point into the record.
type entry struct {
	Event
	dataKind byte
	data     []byte
	req      request
}

// request is the stored form of a GrantRecord. Its slices may point into a
// record.
type request struct {
	instance, label []byte
	parent          uuid.UUID
	capability      []byte // canonical JSON
	resource        uuid.UUID
	hasResource     bool
	hasDeadline     bool
	wall            int64 // nanoseconds since 1970, when hasDeadline
	bootID          []byte
	boot            uint64 // nanoseconds
	limits          Limits
	persist         bool
	declared        bool
	decision        []byte
}

func hashRecord(record []byte) Hash {
	h := sha256.New()
	h.Write([]byte(hashDomain))
	h.Write(record)
	var out Hash
	h.Sum(out[:0])
	return out
}

func appendBytes[T []byte | string](b []byte, s T) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

// encodeEvent appends the canonical form of e, whose data is already encoded.
func encodeEvent(b []byte, e *Event, dataKind byte, data []byte) []byte {
	var flags byte
	set := func(bit byte, on bool) {
		if on {
			flags |= bit
		}
	}
	set(hasGrant, e.Grant != uuid.Nil)
	set(hasVM, e.VM != uuid.Nil)
	set(hasPartition, e.Partition != uuid.Nil)
	set(hasUID, e.Actor.UID != nil)
	set(hasActorVM, e.Actor.VM != uuid.Nil)

	b = append(b, recordVersion)
	b = binary.BigEndian.AppendUint64(b, e.Seq)
	b = binary.BigEndian.AppendUint64(b, uint64(e.Time.UnixNano()))
	b = append(b, e.Prev[:]...)
	b = append(b, flags)
	b = appendBytes(b, string(e.Type))
	for _, id := range []uuid.UUID{e.Grant, e.VM, e.Partition} {
		if id != uuid.Nil {
			b = append(b, id[:]...)
		}
	}
	b = appendBytes(b, e.Actor.Kind)
	if e.Actor.UID != nil {
		b = binary.BigEndian.AppendUint32(b, *e.Actor.UID)
	}
	if e.Actor.VM != uuid.Nil {
		b = append(b, e.Actor.VM[:]...)
	}
	b = binary.AppendUvarint(b, uint64(e.Actor.PID))
	b = append(b, dataKind)
	if dataKind != dataNone {
		b = appendBytes(b, data)
	}
	return b
}

// decodeEvent reads a record and refuses all but the canonical form of an
// event of a known type.
func decodeEvent(record []byte, e *entry) error {
	d := decoder{b: record}
	*e = entry{}
	if len(record) > maxRecord {
		return fmt.Errorf("%w: %d bytes, more than %d", errRecord, len(record), maxRecord)
	}
	if v := d.byte(); v != recordVersion {
		return fmt.Errorf("%w: version %d", errRecord, v)
	}
	e.Seq = d.uint64()
	nanos := int64(d.uint64())
	copy(e.Prev[:], d.take(len(e.Prev)))
	flags := d.byte()
	if flags&^allEventFlags != 0 {
		return fmt.Errorf("%w: flags %#x", errRecord, flags)
	}
	name := d.bytes()
	kind, known := eventKinds[string(name)]
	if !known {
		return fmt.Errorf("%w: unknown type %q", errRecord, name)
	}
	e.Type = kind.name
	d.id(&e.Grant, flags&hasGrant != 0)
	d.id(&e.VM, flags&hasVM != 0)
	d.id(&e.Partition, flags&hasPartition != 0)
	e.Actor.Kind = d.actorKind()
	if flags&hasUID != 0 {
		uid := d.uint32()
		e.Actor.UID = &uid
	}
	d.id(&e.Actor.VM, flags&hasActorVM != 0)
	pid := d.uvarint()
	e.Actor.PID = int(pid)
	if pid > 1<<31 {
		d.fail = true
	}
	switch e.dataKind = d.byte(); e.dataKind {
	case dataNone:
	case dataJSON, dataRequest, dataCarried:
		if e.data = d.bytes(); len(e.data) == 0 {
			d.fail = true
		}
	default:
		d.fail = true
	}
	if err := d.end(); err != nil {
		return err
	}
	e.Time = time.Unix(0, nanos).UTC()
	if (e.dataKind == dataRequest) != (e.Type == GrantRequested) || (e.dataKind == dataCarried) != (e.Type == LedgerCarried) {
		return fmt.Errorf("%w: %s with data of encoding %d", errRecord, e.Type, e.dataKind)
	}
	if e.dataKind == dataRequest {
		return decodeRequest(e.data, &e.req)
	}
	return nil
}

func encodeRequest(b []byte, r *request) []byte {
	var flags byte
	for i, on := range []bool{
		r.parent != uuid.Nil, r.hasResource, r.hasDeadline,
		r.limits.MaxDepth != nil, r.limits.MaxUses != nil, r.persist, r.declared,
	} {
		if on {
			flags |= 1 << i
		}
	}
	b = append(b, flags)
	b = appendBytes(b, r.instance)
	b = appendBytes(b, r.label)
	b = appendBytes(b, r.capability)
	b = appendBytes(b, r.decision)
	if r.parent != uuid.Nil {
		b = append(b, r.parent[:]...)
	}
	if r.hasResource {
		b = append(b, r.resource[:]...)
	}
	if r.hasDeadline {
		b = binary.BigEndian.AppendUint64(b, uint64(r.wall))
		b = appendBytes(b, r.bootID)
		b = binary.AppendUvarint(b, r.boot)
	}
	if r.limits.MaxDepth != nil {
		b = binary.AppendUvarint(b, uint64(*r.limits.MaxDepth))
	}
	if r.limits.MaxUses != nil {
		b = binary.AppendUvarint(b, uint64(*r.limits.MaxUses))
	}
	return b
}

func decodeRequest(data []byte, r *request) error {
	d := decoder{b: data}
	flags := d.byte()
	if flags&^allRequestFlags != 0 {
		return fmt.Errorf("%w: request flags %#x", errRecord, flags)
	}
	*r = request{
		instance: d.bytes(), label: d.bytes(), capability: d.bytes(), decision: d.bytes(),
		hasResource: flags&reqResource != 0, hasDeadline: flags&reqDeadline != 0,
		persist: flags&reqPersist != 0, declared: flags&reqDeclared != 0,
	}
	d.id(&r.parent, flags&reqParent != 0)
	if r.hasResource {
		// The nil UUID is a value here: presence is a flag of its own.
		copy(r.resource[:], d.take(len(r.resource)))
	}
	if r.hasDeadline {
		r.wall = int64(d.uint64())
		r.bootID = d.bytes()
		r.boot = d.uvarint()
	}
	if flags&reqMaxDepth != 0 {
		r.limits.MaxDepth = d.int()
	}
	if flags&reqMaxUses != 0 {
		r.limits.MaxUses = d.int()
	}
	return d.end()
}

// decoder reads a record from the front. After the first mistake everything
// it returns is zero, and end says so.
type decoder struct {
	b    []byte
	fail bool
}

func (d *decoder) take(n int) []byte {
	if d.fail || n < 0 || n > len(d.b) {
		d.fail = true
		return nil
	}
	v := d.b[:n:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) byte() byte {
	if v := d.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (d *decoder) uint32() uint32 {
	if v := d.take(4); v != nil {
		return binary.BigEndian.Uint32(v)
	}
	return 0
}

func (d *decoder) uint64() uint64 {
	if v := d.take(8); v != nil {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

// uvarint takes the shortest form only.
func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 || n > 1 && d.b[n-1] == 0 {
		d.fail = true
		return 0
	}
	d.take(n)
	return v
}

func (d *decoder) int() *int {
	u := d.uvarint()
	if u > 1<<31 {
		d.fail = true
	}
	v := int(u)
	return &v
}

func (d *decoder) bytes() []byte {
	n := d.uvarint()
	if n > uint64(len(d.b)) {
		d.fail = true
		return nil
	}
	return d.take(int(n))
}

// id refuses the nil UUID, which is spelt by absence.
func (d *decoder) id(id *uuid.UUID, present bool) {
	if !present {
		return
	}
	copy(id[:], d.take(len(id)))
	if *id == uuid.Nil {
		d.fail = true
	}
}

func (d *decoder) actorKind() string {
	name := d.bytes()
	for _, k := range actorKinds {
		if string(name) == k {
			return k
		}
	}
	d.fail = true
	return ""
}

func (d *decoder) end() error {
	switch {
	case d.fail:
		return errRecord
	case len(d.b) != 0:
		return fmt.Errorf("%w: %d bytes after its end", errRecord, len(d.b))
	}
	return nil
}

// requestJSON is the visible form of a GrantRecord.
type requestJSON struct {
	Instance   string                 `json:"instance,omitempty"`
	Parent     uuid.UUID              `json:"parent,omitzero"`
	Capability json.RawMessage        `json:"capability"`
	Label      string                 `json:"label,omitempty"`
	Deadline   *capabilities.Deadline `json:"deadline,omitempty"`
	Limits     Limits                 `json:"limits,omitzero"`
	Persist    bool                   `json:"persist,omitempty"`
	Declared   bool                   `json:"declared,omitempty"`
	Decision   json.RawMessage        `json:"decision,omitempty"`
}

func (r *request) deadline() capabilities.Deadline {
	if !r.hasDeadline {
		return capabilities.Deadline{}
	}
	return capabilities.Deadline{Wall: time.Unix(0, r.wall).UTC(), BootID: string(r.bootID), Boot: time.Duration(r.boot)}
}

func (r *request) json() (json.RawMessage, error) {
	v := requestJSON{
		Instance: string(r.instance), Parent: r.parent, Capability: r.capability, Label: string(r.label),
		Limits: r.limits, Persist: r.persist, Declared: r.declared, Decision: r.decision,
	}
	if r.hasDeadline {
		d := r.deadline()
		v.Deadline = &d
	}
	return json.Marshal(v)
}

// newRequest is the stored form of g.
func newRequest(g *GrantRecord) (*request, error) {
	capability, err := json.Marshal(g.Capability)
	if err != nil {
		return nil, fmt.Errorf("%w: capability: %w", ErrInvalidEvent, err)
	}
	for _, s := range []string{g.Instance, g.Label, g.Deadline.BootID} {
		if !utf8.ValidString(s) {
			return nil, fmt.Errorf("%w: %q is not UTF-8", ErrInvalidEvent, s)
		}
	}
	if g.Capability.Kind == "" || g.Capability.Resource == nil {
		return nil, fmt.Errorf("%w: a grant of no capability", ErrInvalidEvent)
	}
	decision, err := compact(g.Decision)
	if err != nil {
		return nil, fmt.Errorf("%w: decision: %w", ErrInvalidEvent, err)
	}
	r := &request{
		instance: []byte(g.Instance), label: []byte(g.Label), parent: g.Parent, capability: capability,
		limits: g.Limits, persist: g.Persist, declared: g.Declared, decision: decision,
	}
	r.resource, r.hasResource = g.Capability.Resource.Partition()
	if !r.hasResource {
		r.resource = uuid.Nil
	}
	for _, n := range []*int{g.Limits.MaxDepth, g.Limits.MaxUses} {
		if n != nil && (*n < 0 || *n > 1<<31) {
			return nil, fmt.Errorf("%w: a limit of %d", ErrInvalidEvent, *n)
		}
	}
	if d := g.Deadline; !d.IsZero() {
		if !storable(d) {
			return nil, fmt.Errorf("%w: a deadline at %v", ErrInvalidEvent, d.Wall)
		}
		r.hasDeadline, r.wall, r.bootID, r.boot = true, d.Wall.UnixNano(), []byte(d.BootID), uint64(d.Boot)
	}
	return r, nil
}

// compact is one JSON value without white space, or nothing.
func compact(data json.RawMessage) ([]byte, error) {
	if len(data) == 0 {
		return nil, nil
	}
	var b bytes.Buffer
	if err := json.Compact(&b, data); err != nil {
		return nil, err
	}
	if b.Len() == 0 || b.String() == "null" {
		return nil, nil
	}
	return b.Bytes(), nil
}
