package api

import (
	"encoding/json"
	"time"

	"github.com/google/uuid"
)

// Health is the answer to a liveness probe of the broker.
type Health struct {
	Status    string    `json:"status"` // ok | starting | degraded
	Version   string    `json:"version"`
	Ready     bool      `json:"ready"`
	PID       int       `json:"pid"`
	StartedAt time.Time `json:"started_at"`
	Epoch     uint64    `json:"epoch"`
	Problems  []string  `json:"problems,omitempty"`
}

// Capability is a capability on the wire. The resource stays raw, so that a
// new kind needs no edit here.
type Capability struct {
	Kind     string          `json:"kind"`
	Resource json.RawMessage `json:"resource"`
	Rights   []string        `json:"rights"`
}

// VMState is where a VM is in its life.
type VMState string

// The states of a VM.
const (
	VMStopped  VMState = "stopped"
	VMStarting VMState = "starting"
	VMRunning  VMState = "running"
	VMStopping VMState = "stopping"
	VMDegraded VMState = "degraded"
)

// AgentState says what the broker knows of a guest's agent.
type AgentState string

// The states of an agent.
const (
	AgentHealthy AgentState = "healthy"
	AgentAbsent  AgentState = "absent"
	AgentUnknown AgentState = "unknown"
)

// Agent is what a guest's agent last said of itself; it is the guest's word,
// bounded and checked, never trusted.
type Agent struct {
	State   AgentState `json:"state"`
	Version string     `json:"version,omitempty"`
	Detail  string     `json:"detail,omitempty"`
}

// VM is a virtual machine as a person sees it.
type VM struct {
	ID            uuid.UUID         `json:"id"`
	Name          string            `json:"name"` // partition/alias
	Aliases       []string          `json:"aliases,omitempty"`
	Partition     *uuid.UUID        `json:"partition,omitempty"` // absent: built-in
	PartitionName string            `json:"partition_name,omitempty"`
	BuiltIn       bool              `json:"built_in"`
	Template      bool              `json:"template"`
	Role          string            `json:"role,omitempty"`
	Labels        map[string]string `json:"labels,omitempty"`
	State         VMState           `json:"state"`
	Instance      string            `json:"instance,omitempty"` // new at each VMM start
	PID           int               `json:"pid,omitempty"`      // the VMM's
	ShimPID       int               `json:"shim_pid,omitempty"`
	StartedAt     *time.Time        `json:"started_at,omitempty"`
	Agent         Agent             `json:"agent"`
	Grants        int               `json:"grants"` // live ones
	Degraded      []string          `json:"degraded,omitempty"`
	SlotsFree     int               `json:"slots_free"`
	Problem       string            `json:"problem,omitempty"`
}

// VMList is the answer to GET /v1/vms.
type VMList struct {
	VMs []VM `json:"vms"`
}

// StopRequest asks a VM to stop.
type StopRequest struct {
	// GraceSeconds is how long the guest may take before it is killed; nil
	// means the broker's default, zero kills at once.
	GraceSeconds *float64 `json:"grace_seconds,omitempty"`
}

// GrantState is a grant's state in the ledger.
type GrantState string

// The states of a grant.
const (
	GrantPending  GrantState = "pending"
	GrantActive   GrantState = "active"
	GrantRevoking GrantState = "revoking"
	GrantRevoked  GrantState = "revoked"
	GrantFailed   GrantState = "failed"
)

// GrantRequest asks for a grant, or with POST /v1/decisions what would become
// of it.
type GrantRequest struct {
	VM         string `json:"vm"`                    // any reference to a VM
	Capability string `json:"capability,omitempty"`  // human spelling; absent with a parent: all of that
	TTLSeconds *int64 `json:"ttl_seconds,omitempty"` // nil: until the VM's exit
	Label      string `json:"label,omitempty"`
	Persist    bool   `json:"persist,omitempty"`
	// AcceptNarrower takes a grant that policy narrowed; without it such a
	// grant is refused with code narrower.
	AcceptNarrower bool `json:"accept_narrower,omitempty"`
	// Parent is a reference to the grant that the new one derives from. Where
	// another VM holds that one, this delegates it.
	Parent   string `json:"parent,omitempty"`
	MaxUses  *int   `json:"max_uses,omitempty"`  // nil: as many as the parent and policy allow
	MaxDepth *int   `json:"max_depth,omitempty"` // generations that may be derived from it; nil: likewise
	// Wait answers only when the guest has it, or the timeout is over;
	// otherwise the answer comes as soon as the grant is durable.
	Wait           bool    `json:"wait,omitempty"`
	TimeoutSeconds float64 `json:"timeout_seconds,omitempty"` // zero: the broker's default
}

// RenewRequest moves the deadline of a grant.
type RenewRequest struct {
	TTLSeconds *int64 `json:"ttl_seconds,omitempty"` // from now; nil: as long as it was last given for
	// AcceptNarrower takes what policy, and the deadline of the grant's
	// parent, leave of the lifetime.
	AcceptNarrower bool `json:"accept_narrower,omitempty"`
	// Wait answers only when what serves the grant in its VM knows, or the
	// timeout is over; otherwise as soon as the renewal is durable.
	Wait           bool    `json:"wait,omitempty"`
	TimeoutSeconds float64 `json:"timeout_seconds,omitempty"` // zero: the broker's default
}

// GrantFilter selects grants. Zero fields select everything.
type GrantFilter struct {
	VM        string       // any reference to a VM
	Resource  string       // human spelling
	Partition string       // name or UUID
	State     []GrantState // empty: all but revoked and failed, unless All
	All       bool
}

// Observed is what the world says of a grant's object, as opposed to what the
// ledger wants.
type Observed struct {
	State  string `json:"state"` // absent | attaching | attached | detaching | gone | unknown
	Detail string `json:"detail,omitempty"`
}

// Grant is a ledger row and what was observed of it.
type Grant struct {
	ID            uuid.UUID  `json:"id"`
	Holder        uuid.UUID  `json:"holder"`
	HolderName    string     `json:"holder_name,omitempty"`
	Partition     *uuid.UUID `json:"partition,omitempty"` // the resource's; absent: the host's
	PartitionName string     `json:"partition_name,omitempty"`
	Capability    Capability `json:"capability"`
	Spelling      string     `json:"spelling"` // with UUIDs
	Spoken        string     `json:"spoken"`   // with petnames
	Label         string     `json:"label,omitempty"`
	Parent        *uuid.UUID `json:"parent,omitempty"`
	Depth         int        `json:"depth"`
	MaxDepth      *int       `json:"max_depth,omitempty"` // generations that may be derived from it; absent: any
	MaxUses       *int       `json:"max_uses,omitempty"`  // absent: uses are not counted
	Uses          int        `json:"uses"`                // charged so far, by it and by what derives from it
	State         GrantState `json:"state"`
	Generation    uint64     `json:"generation"`
	Created       time.Time  `json:"created"`
	Expires       *time.Time `json:"expires,omitempty"` // absent: until the holder's exit
	Renewed       *time.Time `json:"renewed,omitempty"` // when Expires was last moved
	Persist       bool       `json:"persist"`
	Declared      bool       `json:"declared"`
	Observed      Observed   `json:"observed"`
	MountPath     string     `json:"mount_path,omitempty"` // in the guest
	Reason        string     `json:"reason,omitempty"`     // why it is in this state
	Decision      *Decision  `json:"decision,omitempty"`
	Degraded      string     `json:"degraded,omitempty"`
	Trouble       *Trouble   `json:"trouble,omitempty"` // absent: all goes well
	NoAgent       bool       `json:"no_agent"`          // attached, but the guest has no agent to mount it
	Narrowed      bool       `json:"narrowed"`          // policy gave less than asked
}

// GrantList is the answer to GET /v1/grants.
type GrantList struct {
	Grants []Grant `json:"grants"`
}

// RevokeRequest asks that grants end, each with all derived from it. Exactly
// one of IDs, VM, Resource and All is given.
type RevokeRequest struct {
	IDs            []string `json:"ids,omitempty"` // grant references
	VM             string   `json:"vm,omitempty"`
	Resource       string   `json:"resource,omitempty"`
	All            bool     `json:"all,omitempty"`
	Reason         string   `json:"reason,omitempty"`
	DryRun         bool     `json:"dry_run,omitempty"`         // say what would end, and change nothing
	Wait           bool     `json:"wait,omitempty"`            // answer when cut; else once durable
	TimeoutSeconds float64  `json:"timeout_seconds,omitempty"` // zero: the broker's default
}

// RevokeResult tells the grants whose access is cut from those whose
// revocation is durable but whose cut has not been confirmed. With any of the
// latter the HTTP status is 202. A dry run lists in WouldRevoke what would end,
// each grant after what it derives from, and nothing in the others.
type RevokeResult struct {
	Revoked     []Grant `json:"revoked"`
	Revoking    []Grant `json:"revoking"`
	WouldRevoke []Grant `json:"would_revoke,omitempty"`
	DryRun      bool    `json:"dry_run,omitempty"`
}

// Token carries a signed token, base64url without padding. It is a secret:
// it prints and logs as its grant's id.
type Token struct {
	Grant uuid.UUID `json:"grant"`
	Token string    `json:"token"`
}

// Outcome is what policy decided.
type Outcome string

// The outcomes of a decision.
const (
	OutcomeAllow Outcome = "allow"
	OutcomeDeny  Outcome = "deny"
	OutcomeAsk   Outcome = "ask"
	OutcomeError Outcome = "error"
	// OutcomeAbstain is the host's answer where nothing that a request is about is
	// the host's, and it has no objection.
	OutcomeAbstain Outcome = "abstain"
)

// Reason is one rule's contribution to an answer.
type Reason struct {
	Text string `json:"text"`
	Rule string `json:"rule,omitempty"`
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitempty"`
	Kind string `json:"kind"` // allow | deny | ask | undefined | error
}

// Limits are what policy bounded; an absent field is no bound.
type Limits struct {
	TTLSeconds *int64 `json:"ttl_seconds,omitempty"`
	MaxUses    *int64 `json:"max_uses,omitempty"`
	MaxDepth   *int64 `json:"max_depth,omitempty"`
	MaxLive    *int64 `json:"max_live,omitempty"`
	MaxTotal   *int64 `json:"max_total,omitempty"`
	ReadOnly   bool   `json:"read_only,omitempty"`
}

// Answer is one engine's say.
type Answer struct {
	Engine   string   `json:"engine"` // host, or a partition's UUID
	Name     string   `json:"name,omitempty"`
	Outcome  Outcome  `json:"outcome"`
	Reasons  []Reason `json:"reasons,omitempty"`
	Limits   Limits   `json:"limits"`
	Revision string   `json:"revision,omitempty"`
}

// Verdict is what the engines said together.
type Verdict struct {
	Outcome Outcome  `json:"outcome"`
	Summary string   `json:"summary,omitempty"` // one line, with rule and file:line
	Answers []Answer `json:"answers,omitempty"`
	Limits  Limits   `json:"limits"`
}

// Decision is the verdict a grant was made under.
type Decision = Verdict

// Explanation says what would become of a request, without doing it.
type Explanation struct {
	Request GrantRequest `json:"request"`
	Verdict Verdict      `json:"verdict"`
	// Effective is what would be granted; nil when nothing would be.
	Effective *Capability `json:"effective,omitempty"`
	Spelling  string      `json:"spelling,omitempty"` // of Effective
	Actions   []string    `json:"actions,omitempty"`  // the plan, in order
}

// EngineStatus is the state of one policy engine.
type EngineStatus struct {
	Engine   string     `json:"engine"` // host, or a partition's UUID
	Name     string     `json:"name,omitempty"`
	State    string     `json:"state"` // loaded | stale | none
	Revision string     `json:"revision,omitempty"`
	LoadedAt *time.Time `json:"loaded_at,omitempty"`
	Files    []string   `json:"files,omitempty"`
	// Error is why the newest revision was not loaded; the last good one
	// stays in force, or everything is denied if there was none.
	Error     string `json:"error,omitempty"`
	PID       int    `json:"pid,omitempty"` // of the worker; absent when idle
	Decisions uint64 `json:"decisions"`
	Failures  uint64 `json:"failures"`
}

// PolicyStatus is the answer to GET /v1/policy/status and POST
// /v1/policy/reload.
type PolicyStatus struct {
	Engines []EngineStatus `json:"engines"`
}

// Name is a petname of a partition.
type Name struct {
	Name      string    `json:"name"`
	Partition uuid.UUID `json:"partition"`
}

// NameList is the answer to GET /v1/names.
type NameList struct {
	Names []Name `json:"names"`
}

// SetNameRequest is the body of PUT /v1/names/{name}.
type SetNameRequest struct {
	Partition uuid.UUID `json:"partition"`
}

// Partition is a user-data partition.
type Partition struct {
	ID       uuid.UUID `json:"id"`
	Name     string    `json:"name,omitempty"`  // the petname
	Label    string    `json:"label,omitempty"` // what the disk says of itself: a claim
	Dir      string    `json:"dir,omitempty"`
	Present  bool      `json:"present"`
	Writable bool      `json:"writable"`
	VMs      int       `json:"vms"`
	Grants   int       `json:"grants"` // live ones on its data
	Policy   string    `json:"policy"` // loaded | stale | none
	Problems []string  `json:"problems,omitempty"`
}

// PartitionList is the answer to GET /v1/partitions.
type PartitionList struct {
	Partitions []Partition `json:"partitions"`
}

// Actor is who caused an event.
type Actor struct {
	Kind string     `json:"kind"` // person | vm | broker | definition
	UID  *uint32    `json:"uid,omitempty"`
	PID  int        `json:"pid,omitempty"`
	VM   *uuid.UUID `json:"vm,omitempty"`
}

// EventQuery selects events. Zero fields select everything.
type EventQuery struct {
	After uint64     // only events with a greater sequence number
	VM    string     // any reference to a VM
	Grant string     // any reference to a grant
	Types []string   // exact, or a prefix ending in "."
	Since *time.Time // inclusive
	Until *time.Time // exclusive
	// Actor is a kind of actor, or "uid:" and a number, or "vm:" and a reference.
	Actor string
	// Decision is the outcome of the decision on record; see DecisionOf.
	Decision string
	Limit    int // zero: the server's default
	// Records asks for each event's record too; only of the audit.
	Records bool
}

// Event is one entry of the ledger.
type Event struct {
	Seq       uint64          `json:"seq"`
	Time      time.Time       `json:"time"`
	Type      string          `json:"type"`
	Actor     Actor           `json:"actor"`
	Grant     *uuid.UUID      `json:"grant,omitempty"`
	VM        *uuid.UUID      `json:"vm,omitempty"`
	Partition *uuid.UUID      `json:"partition,omitempty"`
	Data      json.RawMessage `json:"data,omitempty"`
	Prev      string          `json:"prev,omitempty"` // hex
	Hash      string          `json:"hash,omitempty"` // hex
	// Record is the event as it is hashed, where that was asked for.
	Record []byte `json:"record,omitempty"`
}

// EventList is a page of the audit. It may hold fewer events than asked for, or
// none, although there are more: a page looks at a bounded part of the ledger.
type EventList struct {
	Events []Event `json:"events"`
	// Next is the cursor for the following page: pass it as after.
	Next uint64 `json:"next"`
	// More says that there are further events beyond Next.
	More bool `json:"more"`
}

// Anchor is an event known from elsewhere.
type Anchor struct {
	Seq  uint64 `json:"seq"`
	Hash string `json:"hash"` // hex
}

// VerifyQuery says what to verify of the chain.
type VerifyQuery struct {
	Anchors []Anchor // events that must be part of it
	// FromAnchor leaves out what is before the first anchor.
	FromAnchor bool
}

// Archive is a file with the events that were in the ledger before it was rotated.
type Archive struct {
	Name    string `json:"name"` // in the directory "archive" of the state directory
	First   uint64 `json:"first"`
	Last    uint64 `json:"last"`
	Missing bool   `json:"missing,omitempty"` // it is not there
}

// Rotation is what came of putting the ledger's events into an archive.
type Rotation struct {
	Archive Archive `json:"archive"`
	Path    string  `json:"path"`   // of the archive's file
	Bytes   int64   `json:"bytes"`  // of the archive
	First   uint64  `json:"first"`  // event of the ledger now
	Grants  int     `json:"grants"` // that were carried over
	// BlockedSeconds is for how long nothing else could be recorded.
	BlockedSeconds float64 `json:"blocked_seconds"`
}

// GapType is the type of what stands in a list or stream of events for those
// that are in archives. It is no event of the ledger.
const GapType = "ledger.gap"

// Gap is the data of what stands for events that are not in the ledger any more.
type Gap struct {
	Reason   string    `json:"reason"` // in words
	First    uint64    `json:"first"`
	Last     uint64    `json:"last"`
	Archives []Archive `json:"archives"` // those that are there and hold some of them
}

// AuditReport is the result of verifying the chain.
type AuditReport struct {
	Events  int    `json:"events"`            // that are whole
	First   uint64 `json:"first"`             // of them
	Last    uint64 `json:"last"`              // of them
	Head    string `json:"head"`              // hash of the last one, hex
	Anchors int    `json:"anchors,omitempty"` // that are part of the chain
	// Archives are those that the chain goes through, the newest first.
	Archives []Archive    `json:"archives,omitempty"`
	Broken   *BrokenChain `json:"broken,omitempty"`
}

// BrokenChain names the first link that does not hold.
type BrokenChain struct {
	Seq     uint64 `json:"seq"`
	Problem string `json:"problem"`
}

// Self is what a guest may know of itself.
type Self struct {
	ID        uuid.UUID  `json:"id"`
	Partition *uuid.UUID `json:"partition,omitempty"` // absent: built-in
	Role      string     `json:"role,omitempty"`
	Instance  string     `json:"instance,omitempty"`
	Now       time.Time  `json:"now"` // the broker's clock
}

// GuestRequest is a guest asking for a capability for itself.
type GuestRequest struct {
	Capability string `json:"capability"` // human spelling
	TTLSeconds *int64 `json:"ttl_seconds,omitempty"`
	Label      string `json:"label,omitempty"`
	Parent     string `json:"parent,omitempty"` // a token, base64url
}

// GuestDelegation is a guest passing on what it holds. Exactly one of Grant and
// Token names the grant.
type GuestDelegation struct {
	Grant      string `json:"grant,omitempty"`      // its id
	Token      string `json:"token,omitempty"`      // its token, base64url
	To         string `json:"to"`                   // the UUID of a VM that this one was introduced to
	Capability string `json:"capability,omitempty"` // human spelling of what is passed on; absent: all of it
	TTLSeconds *int64 `json:"ttl_seconds,omitempty"`
	MaxUses    *int   `json:"max_uses,omitempty"`
	MaxDepth   *int   `json:"max_depth,omitempty"`
	Label      string `json:"label,omitempty"`
}

// GuestGrant is a grant as its holder sees it: nothing of other VMs, but for the
// one it was delegated by, of petnames, or of who decided.
type GuestGrant struct {
	// From is the VM that the grant was delegated by, which its holder may
	// delegate to in turn; absent where it derives from nothing of another VM.
	From     *uuid.UUID `json:"from,omitempty"`
	MaxDepth *int       `json:"max_depth,omitempty"`
	MaxUses  *int       `json:"max_uses,omitempty"`
	Uses     *int       `json:"uses,omitempty"` // with MaxUses

	ID         uuid.UUID  `json:"id"`
	Capability Capability `json:"capability"`
	Spelling   string     `json:"spelling"` // with UUIDs
	Label      string     `json:"label,omitempty"`
	Parent     *uuid.UUID `json:"parent,omitempty"`
	State      GrantState `json:"state"`
	Created    time.Time  `json:"created"`
	Expires    *time.Time `json:"expires,omitempty"`
	MountPath  string     `json:"mount_path,omitempty"`
	Narrowed   bool       `json:"narrowed"`
	// Token is given once, in the answer to the request that made the grant.
	Token string `json:"-"`
}

// GuestGrantList is the answer to GET /v1/capabilities on the guest API.
type GuestGrantList struct {
	Capabilities []GuestGrant `json:"capabilities"`
}

// GuestGranted is the answer to POST /v1/requests on the guest API.
type GuestGranted struct {
	Grant GuestGrant `json:"grant"`
	Token string     `json:"token"`
}

// DropRequest is the body of POST /v1/capabilities/drop, and the optional one
// of DELETE /v1/capabilities/{id}, on the guest API.
type DropRequest struct {
	Token string `json:"token"`
}

// Problem is an RFC 9457 problem document.
type Problem struct {
	Type       string   `json:"type"`
	Title      string   `json:"title"`
	Status     int      `json:"status"`
	Detail     string   `json:"detail,omitempty"`
	Instance   string   `json:"instance,omitempty"` // of an internal error: found in the log
	Code       Code     `json:"code"`
	Candidates []string `json:"candidates,omitempty"`
	Verdict    *Verdict `json:"verdict,omitempty"`
	Grant      *Grant   `json:"grant,omitempty"`
	// RetryAfter is in seconds, with code rate_limited and unavailable.
	RetryAfter int `json:"retry_after,omitempty"`
}
