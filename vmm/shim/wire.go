package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
)

// Limits of the wire. A reply holds at most MaxObjects states, which fit with
// room to spare.
const (
	maxRequest = 16 << 10
	maxReply   = 160 << 10
	maxWatch   = time.Minute
	maxIDLen   = 64
	maxTagLen  = 36 // virtio-fs: the tag is 36 bytes of configuration space
)

// Object is a shared directory or file that a VM shall have.
type Object struct {
	// ID names the object for ever: [a-z0-9-], at most 64 bytes.
	ID string `json:"id"`
	// Generation orders what is asked of one id. Older ones are refused.
	Generation uint64 `json:"generation"`
	// Instance is the run of the VM (State.Instance) that the object is for.
	// A rebooted VM is another instance and does not get it.
	Instance string `json:"instance"`
	// Tag is the virtio-fs tag that the guest mounts by.
	Tag      string `json:"tag"`
	ReadOnly bool   `json:"read_only,omitempty"`
	// SingleFile is the base name under which one file is shared. Empty: the
	// descriptor is a directory.
	SingleFile string `json:"single_file,omitempty"`
	// UID and GID own what the guest creates.
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
	// Deadline is when the shim ends the object by itself. Zero: never.
	Deadline capabilities.Deadline `json:"deadline,omitzero"`
}

// Phases of an object.
const (
	Attaching = "attaching"
	Attached  = "attached"
	Detaching = "detaching"
	Gone      = "gone"
)

// Phases of a VM.
const (
	Starting = "starting"
	Running  = "running"
	Stopping = "stopping"
	Stopped  = "stopped"
)

// ObjectState is what the shim sees of one object.
type ObjectState struct {
	ID         string                `json:"id"`
	Generation uint64                `json:"generation"`
	Phase      string                `json:"phase"`
	Tag        string                `json:"tag,omitempty"`
	PIDs       []Proc                `json:"pids,omitempty"`
	Deadline   capabilities.Deadline `json:"deadline,omitzero"`
	// Killed tells that the guest did not let go in time and what served the
	// object was killed under it.
	Killed bool `json:"killed,omitempty"`
	// SingleFile: one file is shared, not a directory. Its name is the caller's to
	// know: many long ones would not fit into a reply.
	SingleFile bool      `json:"single_file,omitempty"`
	Error      string    `json:"error,omitempty"`
	Since      time.Time `json:"since,omitzero"`
}

// State is what the shim sees of its VM. Seq grows with every change.
type State struct {
	Seq      uint64    `json:"seq"`
	VM       uuid.UUID `json:"vm"`
	Instance string    `json:"instance"`
	Phase    string    `json:"phase"`
	// Objects are those that exist or are on their way in or out, and those
	// that ended under the guest, killed or not. Any other is gone.
	Objects    []ObjectState `json:"objects"`
	Degraded   []string      `json:"degraded,omitempty"`
	SlotsFree  int           `json:"slots_free"`
	ExitReason string        `json:"exit_reason,omitempty"`
	VMMPid     int           `json:"vmm_pid,omitempty"`
	ShimPid    int           `json:"shim_pid"`
}

// Codes of an Error.
const (
	CodeNoSlots         = "no_slots"
	CodeStaleGeneration = "stale_generation"
	CodeWrongInstance   = "wrong_instance"
	CodeVMM             = "vmm"
	CodeLaunch          = "launch"
	CodeNotRunning      = "not_running"
	CodeBadRequest      = "bad_request"
	// CodeExpired refuses an object whose deadline has passed.
	CodeExpired = "expired"
	// CodeRemoved answers a put that a removal overtook.
	CodeRemoved = "removed"
	// CodeRetired refuses an id whose device was killed in this instance.
	CodeRetired = "retired"
)

// Error is a refusal by the shim.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// Is makes errors.Is compare codes.
func (e *Error) Is(target error) bool {
	var t *Error
	return errors.As(target, &t) && t.Code == e.Code && (t.Message == "" || t.Message == e.Message)
}

func refuse(code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Operations of the wire.
const (
	opPing   = "ping"
	opState  = "state"
	opWatch  = "watch"
	opPut    = "put"
	opRemove = "remove"
	opExtend = "extend"
	opStop   = "stop"
)

// request is one packet from the broker. A put carries one descriptor.
type request struct {
	Op         string                `json:"op"`
	Object     *Object               `json:"object,omitempty"`
	ID         string                `json:"id,omitempty"`
	Generation uint64                `json:"generation,omitempty"`
	Instance   string                `json:"instance,omitempty"`
	Deadline   capabilities.Deadline `json:"deadline,omitzero"`
	Seen       uint64                `json:"seen,omitempty"`
	GraceMS    int64                 `json:"grace_ms,omitempty"`
}

// reply is the one packet that answers it.
type reply struct {
	Error  *Error       `json:"error,omitempty"`
	Object *ObjectState `json:"object,omitempty"`
	State  *State       `json:"state,omitempty"`
}

// decodeRequest parses a packet strictly: one JSON value, no unknown field,
// and only what belongs to the operation.
func decodeRequest(packet []byte) (*request, error) {
	if len(packet) > maxRequest {
		return nil, refuse(CodeBadRequest, "request of %d bytes is longer than %d", len(packet), maxRequest)
	}
	var r request
	if err := decodeStrict(packet, &r); err != nil {
		return nil, refuse(CodeBadRequest, "request is not understood: %v", err)
	}
	if (r.Object != nil) != (r.Op == opPut) {
		return nil, refuse(CodeBadRequest, "an object belongs to a put and only there")
	}
	switch r.Op {
	case opPing, opState, opWatch:
	case opPut:
		if err := r.Object.check(); err != nil {
			return nil, err
		}
	case opRemove:
		if err := checkID(r.ID); err != nil {
			return nil, err
		}
	case opExtend:
		if err := r.checkExtension(); err != nil {
			return nil, err
		}
	case opStop:
		if r.GraceMS < 0 || r.GraceMS > int64(time.Hour/time.Millisecond) {
			return nil, refuse(CodeBadRequest, "grace of %d ms is not between 0 and an hour", r.GraceMS)
		}
	default:
		return nil, refuse(CodeBadRequest, "operation %q is unknown", r.Op)
	}
	return &r, nil
}

func decodeStrict(data []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return err
	}
	if dec.More() || len(bytes.TrimSpace(data[dec.InputOffset():])) > 0 {
		return errors.New("data after the value")
	}
	return nil
}

func (o *Object) check() error {
	if err := checkID(o.ID); err != nil {
		return err
	}
	if o.Generation == 0 {
		return refuse(CodeBadRequest, "object %s has no generation", o.ID)
	}
	if o.Tag == "" || len(o.Tag) > maxTagLen || strings.ContainsFunc(o.Tag, func(r rune) bool { return !tagRune(r) }) {
		return refuse(CodeBadRequest, "tag %q is not 1 to %d of [A-Za-z0-9._-]", o.Tag, maxTagLen)
	}
	if name := o.SingleFile; name != "" {
		if len(name) > 255 || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
			return refuse(CodeBadRequest, "%q is not a file's base name", name)
		}
	}
	return nil
}

func tagRune(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-'
}

func checkID(id string) error {
	if id == "" || len(id) > maxIDLen {
		return refuse(CodeBadRequest, "object id %q is not 1 to %d bytes", id, maxIDLen)
	}
	for _, r := range id {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' {
			return refuse(CodeBadRequest, "object id %q is not of [a-z0-9-]", id)
		}
	}
	return nil
}
