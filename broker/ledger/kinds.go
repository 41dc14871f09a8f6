package ledger

// eventKind says what an event of one type needs.
type eventKind struct {
	name                 EventType
	grant, vm, partition bool
}

var (
	eventKinds = buildEventKinds()
	actorKinds = [...]string{ActorPerson, ActorVM, ActorBroker, ActorDefinition}
)

func buildEventKinds() map[string]*eventKind {
	m := make(map[string]*eventKind)
	for _, k := range []eventKind{
		{name: LedgerCreated},
		{name: LedgerRotated},
		{name: LedgerCarried},
		{name: GrantRequested, grant: true, vm: true},
		{name: GrantDenied},
		{name: GrantActive, grant: true},
		{name: GrantFailed, grant: true},
		{name: GrantRevoking, grant: true},
		{name: GrantRevoked, grant: true},
		{name: GrantRenewed, grant: true},
		{name: GrantDegraded, grant: true},
		{name: GrantUsed, grant: true},
		{name: GrantTroubled, grant: true},
		{name: GrantRecovered, grant: true},
		{name: TokenIssued, grant: true},
		{name: TokenRefused},
		{name: GuestLimited, vm: true},
		{name: VMBound, vm: true},
		{name: VMStarted, vm: true},
		{name: VMExited, vm: true},
		{name: VMConsole, vm: true},
		{name: NameSet, partition: true},
		{name: NameRemoved, partition: true},
		{name: PolicyLoaded},
		{name: PolicyRejected},
		{name: BrokerStarted},
		{name: BrokerStopped},
		{name: KeyCreated},
		{name: KeyRevoked},
		{name: LedgerRestored},
		{name: ClockHighwater},
	} {
		m[string(k.name)] = &k
	}
	return m
}

// EventTypes are all the types there are, in no order.
func EventTypes() []EventType {
	out := make([]EventType, 0, len(eventKinds))
	for _, k := range eventKinds {
		out = append(out, k.name)
	}
	return out
}

// ActorKinds are all the kinds of actor.
func ActorKinds() []string { return actorKinds[:] }
