package ledger

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"spectrum-os.org/broker/capabilities"
)

// EventType names what happened. The set is closed: a type that this package
// does not know is refused when it is appended and when it is loaded.
type EventType string

// The event types, with the ids they need and the shape of their Data.
const (
	LedgerCreated EventType = "ledger.created" // first event; CreatedData
	LedgerRotated EventType = "ledger.rotated" // first event of a segment: what came before is in an archive; RotatedData
	LedgerCarried EventType = "ledger.carried" // follow ledger.rotated: what is in force

	GrantRequested EventType = "grant.requested" // Grant, VM (holder), Partition (holder's; nil: built-in); GrantRecord
	GrantDenied    EventType = "grant.denied"    // a decision only, no grant comes of it
	GrantActive    EventType = "grant.active"    // Grant; Change
	GrantFailed    EventType = "grant.failed"    // Grant; Change
	GrantRevoking  EventType = "grant.revoking"  // Grant; Change
	GrantRevoked   EventType = "grant.revoked"   // Grant; Change
	GrantRenewed   EventType = "grant.renewed"   // Grant; RenewData: not a move, its deadline is later from here on
	GrantDegraded  EventType = "grant.degraded"  // Grant; Change: not a move, the reason is kept beside the state
	GrantUsed      EventType = "grant.used"      // Grant; UsedData: one use, charged to it and to every ancestor
	GrantTroubled  EventType = "grant.troubled"  // Grant; Change with a reason: what it stands for cannot be made or taken away just now
	GrantRecovered EventType = "grant.recovered" // Grant; Change: the end of that

	TokenIssued  EventType = "token.issued"  // Grant; IssuedData: a person was handed its token, or a key signed it that was not current when it was made
	TokenRefused EventType = "token.refused" // somebody presented a token that was not accepted

	GuestLimited EventType = "guest.limited" // VM: its requests are refused and no longer recorded, until there are fewer

	VMBound   EventType = "vm.bound"   // VM, Partition (nil: built-in); BoundData
	VMStarted EventType = "vm.started" // VM; RunData
	VMExited  EventType = "vm.exited"  // VM; RunData
	VMConsole EventType = "vm.console" // VM; a person opened its console

	NameSet     EventType = "name.set"     // Partition; NameData
	NameRemoved EventType = "name.removed" // Partition; NameData, for the reader of the audit

	PolicyLoaded   EventType = "policy.loaded"
	PolicyRejected EventType = "policy.rejected"

	BrokerStarted EventType = "broker.started"
	BrokerStopped EventType = "broker.stopped"

	KeyCreated EventType = "key.created" // KeyCreatedData; the one key that signs from here on
	KeyRevoked EventType = "key.revoked" // KeyRevokedData; never the current one

	LedgerRestored EventType = "ledger.restored" // RestoredData; a new epoch, and every grant that is not final ends

	ClockHighwater EventType = "clock.highwater" // HighwaterData; without it the event's own time counts
)

// Hash is a SHA-256 digest; as text it is lower-case hexadecimal.
type Hash [32]byte

func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText writes hexadecimal.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads exactly 64 hexadecimal digits.
func (h *Hash) UnmarshalText(b []byte) error {
	if hex.DecodedLen(len(b)) != len(h) || len(b)%2 != 0 {
		return fmt.Errorf("a hash is 64 hexadecimal digits, not %d", len(b))
	}
	_, err := hex.Decode(h[:], b)
	return err
}

// The kinds of actor.
const (
	ActorPerson     = "person"     // somebody on the host socket
	ActorVM         = "vm"         // a guest on its own socket
	ActorBroker     = "broker"     // the broker by itself: expiry, reconciling
	ActorDefinition = "definition" // a grant declared in a VM's definition
)

// Actor is who caused an event, as authenticated by the channel it came on.
type Actor struct {
	Kind string    `json:"kind"`
	UID  *uint32   `json:"uid,omitempty"`
	VM   uuid.UUID `json:"vm,omitzero"`
	PID  int       `json:"pid,omitempty"`
}

// Event is one entry of the log. Whoever appends fills Type, Actor, the ids
// and Data; the ledger sets Seq, Time, Prev and Hash. Data is one JSON value
// or empty, and must not be changed after it was handed over.
type Event struct {
	Seq       uint64          `json:"seq"`
	Time      time.Time       `json:"time"`
	Type      EventType       `json:"type"`
	Actor     Actor           `json:"actor"`
	Grant     uuid.UUID       `json:"grant,omitzero"`
	VM        uuid.UUID       `json:"vm,omitzero"`
	Partition uuid.UUID       `json:"partition,omitzero"`
	Data      json.RawMessage `json:"data,omitempty"`
	Prev      Hash            `json:"prev"`
	Hash      Hash            `json:"hash"`

	request *GrantRecord // set by NewGrant, spares reading Data back
}

// LogValue names the event without its data.
func (e Event) LogValue() slog.Value {
	return slog.GroupValue(slog.Uint64("seq", e.Seq), slog.String("type", string(e.Type)), slog.String("grant", e.Grant.String()))
}

// Limits are the counted limits of a grant; nil means unlimited.
type Limits struct {
	MaxDepth *int `json:"max_depth,omitempty"` // how many generations may be derived from it
	MaxUses  *int `json:"max_uses,omitempty"`
}

// GrantRecord is the Data of grant.requested: all of a grant that never
// changes. Its id, holder and the holder's partition are the event's own
// Grant, VM and Partition.
type GrantRecord struct {
	Instance   string                  `json:"instance,omitempty"`
	Parent     uuid.UUID               `json:"parent,omitzero"`
	Capability capabilities.Capability `json:"-"`
	Label      string                  `json:"label,omitempty"`
	Deadline   capabilities.Deadline   `json:"-"`
	Limits     Limits                  `json:"limits,omitzero"`
	Persist    bool                    `json:"persist,omitempty"`
	Declared   bool                    `json:"declared,omitempty"`
	Decision   json.RawMessage         `json:"decision,omitempty"`
}

// NewGrant is the grant.requested event of a grant with the given id, held by
// holder, a VM of holderPartition.
func NewGrant(actor Actor, id, holder, holderPartition uuid.UUID, r GrantRecord) Event {
	return Event{Type: GrantRequested, Actor: actor, Grant: id, VM: holder, Partition: holderPartition, request: &r}
}

// Change is the Data of the events that move a grant. Members other than
// these are kept in the log and mean nothing to the ledger.
type Change struct {
	Reason   string `json:"reason,omitempty"`
	Instance string `json:"instance,omitempty"` // non-empty: the VM's instance it is tied to from here on
}

// NewChange is an event of type t about an existing grant. Holder and
// partition are filled in when it is appended.
func NewChange(t EventType, actor Actor, id uuid.UUID, c Change) Event {
	return Event{Type: t, Actor: actor, Grant: id, Data: mustJSON(c)}
}

// UsedData is the Data of grant.used.
type UsedData struct {
	Instance string `json:"instance"` // the holder's run that the use was for; each run is charged once
}

// NewUse is the grant.used event of one use of a grant for a run of its holder.
func NewUse(actor Actor, id uuid.UUID, instance string) Event {
	return Event{Type: GrantUsed, Actor: actor, Grant: id, Data: mustJSON(UsedData{instance})}
}

// CreatedData is the Data of ledger.created.
type CreatedData struct {
	Ledger uuid.UUID `json:"ledger"` // random, tells two ledgers apart
	Epoch  uint64    `json:"epoch"`
}

// BoundData is the Data of vm.bound.
type BoundData struct {
	Alias string `json:"alias,omitempty"` // directory name in the partition, where the ledger keeps the VM's id
}

// RunData is the Data of vm.started and vm.exited.
type RunData struct {
	Instance string `json:"instance,omitempty"`
	Reason   string `json:"reason,omitempty"`
}

// NameData is the Data of name.set and name.removed.
type NameData struct {
	Name string `json:"name"`
}

// HighwaterData is the Data of clock.highwater.
type HighwaterData struct {
	Wall time.Time `json:"wall"`
	// BootID and Boot are the boot's time at Wall.
	BootID string        `json:"boot_id,omitempty"`
	Boot   time.Duration `json:"boot_ns,omitempty"`
}

// mustJSON marshals one of this package's own data types, which cannot fail.
func mustJSON(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	if string(b) == "{}" {
		return nil
	}
	return b
}

// JSON is v as Event.Data.
func JSON(v any) json.RawMessage { return mustJSON(v) }
