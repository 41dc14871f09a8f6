package policy

import (
	"encoding/json"
	"time"

	"github.com/google/uuid"
)

// EngineID names the engine of the host or of one partition.
type EngineID struct {
	Host      bool
	Partition uuid.UUID // zero when Host
}

// HostEngine is the engine that is asked about everything.
var HostEngine = EngineID{Host: true}

// PartitionEngine is the engine of one user-data partition.
func PartitionEngine(id uuid.UUID) EngineID { return EngineID{Partition: id} }

// String is "host" or the partition's UUID: the value of input.partition.
func (e EngineID) String() string {
	if e.Host {
		return "host"
	}
	return e.Partition.String()
}

// MarshalText makes an EngineID a JSON string.
func (e EngineID) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (e *EngineID) UnmarshalText(text []byte) error {
	if string(text) == "host" {
		*e = HostEngine
		return nil
	}
	id, err := uuid.ParseBytes(text)
	if err != nil {
		return err
	}
	*e = PartitionEngine(id)
	return nil
}

// Actions a policy is asked about.
const (
	ActionGrant    = "grant"
	ActionDelegate = "delegate"
	ActionSpawn    = "spawn"
	ActionRequest  = "request"
)

// Kinds of requesters.
const (
	RequesterPerson = "person"
	RequesterVM     = "vm"
)

// Input is the document a policy sees as `input`. Its shape is
// schema/input.json; a test holds the two together. Nil slices and maps are
// sent as empty ones, so that a rule that iterates is never undefined by
// accident.
type Input struct {
	Action     string      `json:"action"`
	Now        time.Time   `json:"now"`
	Requester  Requester   `json:"requester"`
	Holder     Holder      `json:"holder"`
	Capability Capability  `json:"capability"`
	Parent     *Capability `json:"parent"`
	// Partition is the engine that is being asked; Decide sets it.
	Partition string `json:"partition"`
}

// Requester is who asks, as the broker's channel authenticated it.
type Requester struct {
	Kind string     `json:"kind"`
	UID  *uint32    `json:"uid,omitempty"`
	VM   *uuid.UUID `json:"vm,omitempty"`
}

// Holder is the VM that would hold the capability.
type Holder struct {
	VM         uuid.UUID   `json:"vm"`
	Partition  *uuid.UUID  `json:"partition"` // nil: a built-in VM, the host's
	Disposable bool        `json:"disposable"`
	Template   *uuid.UUID  `json:"template,omitempty"`
	Ancestors  []uuid.UUID `json:"ancestors"` // spawner first
	// Own is what the holder's definition says of itself. Decide drops it for
	// every engine but the one of the holder's own partition, to which alone
	// it is not an attacker's claim.
	Own *Own `json:"own,omitempty"`
}

// Own is what a VM's definition says of itself.
type Own struct {
	Names  []string          `json:"names"`
	Labels map[string]string `json:"labels"`
}

// Capability is a capability as policies see it. Resource is the kind's
// canonical JSON.
type Capability struct {
	Kind       string          `json:"kind"`
	Resource   json.RawMessage `json:"resource"`
	Rights     []string        `json:"rights"`
	TTLSeconds *int64          `json:"ttl_seconds,omitempty"`
}

// Sources are one revision of one engine's policy, as read from disk.
type Sources struct {
	Files    map[string][]byte `json:"files"`     // base name → Rego text
	Data     []byte            `json:"data"`      // data.json or data.yaml; nil: none
	DataName string            `json:"data_name"` // its base name, which decides the format
	Dir      string            `json:"dir"`       // prefix of file names in reasons and findings
}
