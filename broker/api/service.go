package api

import (
	"context"
	"net"

	"github.com/google/uuid"
)

// The kinds of caller.
const (
	CallerPerson = "person"
	CallerVM     = "vm"
)

// Caller is who makes a call, as the kernel says, never as the caller does: a
// person's process by its peer credentials, a VM by the socket its connection
// arrived on.
type Caller struct {
	Kind string // person | vm
	UID  uint32
	GID  uint32
	PID  int32
	VM   uuid.UUID // of a VM
}

// Service is what the host API serves. Implementations must be safe for
// concurrent use, honour ctx, and return *Error for whatever a caller may
// act on; any other error is answered as internal, its text only logged.
type Service interface {
	Health(ctx context.Context) Health

	ListVMs(ctx context.Context) ([]VM, error)
	ShowVM(ctx context.Context, ref string) (VM, error)
	StartVM(ctx context.Context, by Caller, ref string) (VM, error)
	StopVM(ctx context.Context, by Caller, ref string, req StopRequest) (VM, error)
	// Console opens the VM's serial console; the server closes the
	// connection when the client goes.
	Console(ctx context.Context, by Caller, ref string) (net.Conn, error)

	Grant(ctx context.Context, by Caller, req GrantRequest) (Grant, error)
	ListGrants(ctx context.Context, f GrantFilter) ([]Grant, error)
	ShowGrant(ctx context.Context, ref string) (Grant, error)
	// Renew gives a live grant a later deadline, or refuses and changes nothing.
	Renew(ctx context.Context, by Caller, ref string, req RenewRequest) (Grant, error)
	// Why tells how a grant came to be, step by step up to what derives from nothing.
	Why(ctx context.Context, ref string) (Why, error)
	Revoke(ctx context.Context, by Caller, req RevokeRequest) (RevokeResult, error)
	Token(ctx context.Context, by Caller, ref string) (Token, error)
	Explain(ctx context.Context, by Caller, req GrantRequest) (Explanation, error)

	ListKeys(ctx context.Context) ([]Key, error)
	RotateKeys(ctx context.Context, by Caller) (Key, error)
	RevokeKey(ctx context.Context, by Caller, ref string, req RevokeKeyRequest) (RevokeKeyResult, error)

	ReloadPolicy(ctx context.Context, by Caller) (PolicyStatus, error)
	PolicyStatus(ctx context.Context) (PolicyStatus, error)

	ListNames(ctx context.Context) ([]Name, error)
	SetName(ctx context.Context, by Caller, name string, partition uuid.UUID) (Name, error)
	RemoveName(ctx context.Context, by Caller, name string) error
	ListPartitions(ctx context.Context) ([]Partition, error)

	// Plan is what the broker would do now, in the VM that is named, or in all
	// of them.
	Plan(ctx context.Context, vm string) (Plan, error)

	// Events returns a page of those after q.After in order, at most q.Limit of
	// them, in a bounded time: it may return fewer, or none, and say that there
	// are more.
	Events(ctx context.Context, q EventQuery) (EventList, error)
	// EventsWake returns a channel that receives after commits (coalesced)
	// until ctx is done. Take it before reading, so that none is missed.
	EventsWake(ctx context.Context) <-chan struct{}
	VerifyAudit(ctx context.Context, q VerifyQuery) (AuditReport, error)
	RotateAudit(ctx context.Context, by Caller) (Rotation, error)
}

// GuestService is what the guest API serves. vm is the VM whose socket the
// connection arrived on. What a guest may not know exists is denied in the
// same words as what policy refuses.
type GuestService interface {
	Self(ctx context.Context, vm uuid.UUID) (Self, error)
	Capabilities(ctx context.Context, vm uuid.UUID) ([]GuestGrant, error)
	// Request returns a grant whose Token is set.
	Request(ctx context.Context, vm uuid.UUID, req GuestRequest) (GuestGrant, error)
	// Delegate passes on a grant of the VM's own, or what is narrower, to a VM
	// that it was introduced to. Every other VM, and what policy refuses, is
	// refused in the same words. It does not wait for the other VM.
	Delegate(ctx context.Context, vm uuid.UUID, req GuestDelegation) (GuestGrant, error)
	// Token hands out the token of a grant of the VM's own.
	Token(ctx context.Context, vm, id uuid.UUID) (Token, error)
	// Drop ends a grant of the VM's own, or one that derives from such a grant,
	// named by its id, by its token, or by both, which then must agree. A zero
	// id means the token's.
	Drop(ctx context.Context, vm, id uuid.UUID, token string) (GuestGrant, error)
}
