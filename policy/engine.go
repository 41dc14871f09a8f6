package policy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// engine is the policy of the host or of one partition: the revision in force
// and the one worker that evaluates it.
//
// Two locks, and no other is shared between engines: turn is held while the
// worker answers, which the deadline bounds, and mu for a moment to read or
// change what Status shows. A load happens in a second worker and takes turn
// only to put it in force.
type engine struct {
	id      EngineID
	name    string
	opts    *Options
	spawner *spawner
	loads   chan struct{} // one load at a time; holds a token while free
	turn    chan struct{} // one request at a time; holds a token while free

	// While turn is held:
	worker  *process
	removed bool

	mu       sync.Mutex
	src      *Sources // the last good ones
	revision string
	loadedAt time.Time
	lastUse  time.Time
	lastErr  string
	failures int // in a row
	retryAt  time.Time
	live     *process // the same as worker, for Status
	asked    uint64
	restarts uint64
}

func newEngine(id EngineID, opts *Options, s *spawner) *engine {
	e := &engine{
		id: id, name: opts.Name(id), opts: opts, spawner: s,
		loads: make(chan struct{}, 1), turn: make(chan struct{}, 1),
	}
	e.loads <- struct{}{}
	e.turn <- struct{}{}
	return e
}

// take waits for a lock of an engine, at most so long.
func take(ctx context.Context, lock chan struct{}, limit time.Duration) error {
	select {
	case <-lock:
		return nil
	default:
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-lock:
		return nil
	case <-t.C:
		return errors.New("too many requests are waiting for it")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// load compiles sources in a new worker and puts them in force.
func (e *engine) load(ctx context.Context, src Sources, revision string) error {
	if err := take(ctx, e.loads, e.opts.LoadTimeout); err != nil {
		return fmt.Errorf("cannot load the policy of %s: %w", e.opts.Name(e.id), err)
	}
	defer func() { e.loads <- struct{}{} }()
	p, err := e.compileInNew(ctx, src)
	if err != nil {
		e.mu.Lock()
		e.lastErr = err.Error()
		inForce := e.revision
		e.mu.Unlock()
		e.opts.Log.Warn("policy rejected", "engine", e.name, "error", err, "in_force", inForce)
		return fmt.Errorf("cannot load the policy of %s: %w", e.opts.Name(e.id), err)
	}
	<-e.turn // bounded by the deadline of whoever has it
	defer func() { e.turn <- struct{}{} }()
	if e.removed {
		p.close()
		return fmt.Errorf("cannot load the policy of %s: it was removed", e.opts.Name(e.id))
	}
	old := e.replace(p)
	e.mu.Lock()
	e.src, e.revision, e.loadedAt = &src, revision, time.Now()
	e.lastErr, e.failures, e.retryAt = "", 0, time.Time{}
	e.mu.Unlock()
	if old != nil {
		old.close()
	}
	e.opts.Log.Info("policy loaded", "engine", e.name, "revision", revision, "sandbox", p.sandbox)
	return nil
}

// compileInNew starts a worker that has compiled the sources.
func (e *engine) compileInNew(ctx context.Context, src Sources) (*process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	deadline := time.Now().Add(e.opts.LoadTimeout)
	p, err := startProcess(e.spawner, e.opts.Worker, e.opts.memory(), deadline)
	if err != nil {
		return nil, err
	}
	stop := p.untilCancelled(ctx)
	var reply loadReply
	err = p.call(opLoad, src, &reply, deadline)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err == nil && hasErrors(reply.Findings) {
		err = &LoadError{Findings: reply.Findings}
	}
	if err != nil {
		p.close()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, e.describe("loading", e.opts.LoadTimeout, err)
	}
	return p, nil
}

func (e *engine) describe(what string, limit time.Duration, err error) error {
	var ended *workerEnded
	switch {
	case errors.Is(err, errTimeout):
		return fmt.Errorf("%s took longer than %s and was stopped", what, limit)
	case errors.As(err, &ended):
		return fmt.Errorf("%s ended the policy's worker: it %w", what, err)
	}
	return err
}

// replace puts a worker in force and returns the one before. turn is held.
func (e *engine) replace(p *process) (old *process) {
	old, e.worker = e.worker, p
	e.mu.Lock()
	e.live, e.lastUse = p, time.Now()
	e.mu.Unlock()
	return old
}

// decide is the engine's answer; every failure is an answer too.
func (e *engine) decide(ctx context.Context, in Input, concerned, explain bool) Answer {
	a := Answer{Engine: e.id, Name: e.name, Concerned: concerned}
	payload, err := in.marshal()
	if err != nil {
		return a.failed(err)
	}
	// Ten deadlines is how long a queue may get before it is refused rather
	// than waited in.
	if err := take(ctx, e.turn, 10*e.opts.DecideTimeout); err != nil {
		return a.failed(err)
	}
	if err := e.ready(); err != nil {
		e.turn <- struct{}{}
		return a.failed(err)
	}
	return e.put(a, payload).answer(explain)
}

// question is one that an engine was asked. answer must be called: until then it
// has the engine's turn.
type question struct {
	engine  *engine
	a       Answer
	payload []byte
	err     error // it could not be put
}

// begin asks without waiting for anything, where the engine is free and its worker
// alive; else it asks nothing.
func (e *engine) begin(in Input, concerned bool) (*question, bool) {
	select {
	case <-e.turn:
	default:
		return nil, false
	}
	payload, err := in.marshal()
	if err != nil || !e.fit() {
		e.turn <- struct{}{}
		return nil, false
	}
	return e.put(Answer{Engine: e.id, Name: e.name, Concerned: concerned}, payload), true
}

// put puts a question to the worker. turn is held.
func (e *engine) put(a Answer, payload []byte) *question {
	e.mu.Lock()
	a.Revision = e.revision
	e.lastUse = time.Now()
	e.asked++
	e.mu.Unlock()
	q := &question{engine: e, a: a, payload: payload}
	q.err = e.worker.send(opDecide, payload, time.Now().Add(e.opts.DecideTimeout))
	return q
}

// answer waits for the worker, and gives the turn back.
func (q *question) answer(explain bool) Answer {
	e, a := q.engine, q.a
	defer func() { e.turn <- struct{}{} }()
	d, err := e.receive(opDecide, q.err)
	if err != nil {
		return a.failed(e.fell(err))
	}
	a.set(d)
	if explain || a.Outcome == Deny || a.Outcome == Ask {
		// A traced evaluation that fails where the plain one did not takes
		// nothing away from the answer but the rules' places.
		if traced, err := e.ask(opExplain, q.payload); err != nil {
			_ = e.fell(err)
		} else if traced.Error == nil && traced.Allow == d.Allow {
			a.Reasons = reasonsFor(a.Outcome, traced.Reasons, explain)
		}
	}
	e.settled()
	return a
}

// fit tells whether there is a worker to ask. turn is held.
func (e *engine) fit() bool { return e.worker != nil && !e.worker.dead() && !e.worker.retire }

// ready makes sure there is a live worker. turn is held.
func (e *engine) ready() error {
	if e.fit() {
		return nil
	}
	if old := e.replace(nil); old != nil {
		old.close()
	}
	e.mu.Lock()
	src, retryAt, lastErr := e.src, e.retryAt, e.lastErr
	e.mu.Unlock()
	switch {
	case e.removed:
		return errors.New("it was removed")
	case src == nil && lastErr != "":
		return fmt.Errorf("it has no policy in force: %s", lastErr)
	case src == nil:
		return errors.New("it has no policy in force")
	case time.Now().Before(retryAt):
		return fmt.Errorf("its worker starts again in %s, after: %s", time.Until(retryAt).Round(time.Millisecond), lastErr)
	}
	// Not the request's context: who waits next wants the worker too.
	p, err := e.compileInNew(context.Background(), *src)
	if err != nil {
		return e.fell(err)
	}
	e.replace(p)
	return nil
}

func (e *engine) ask(kind op, payload []byte) (decision, error) {
	if e.worker == nil {
		return decision{}, &workerEnded{"ended before"}
	}
	return e.receive(kind, e.worker.send(kind, payload, time.Now().Add(e.opts.DecideTimeout)))
}

// receive is the decision that the worker was asked for, unless asking failed.
func (e *engine) receive(kind op, err error) (decision, error) {
	var answer []byte
	if err == nil {
		answer, err = e.worker.receive(kind)
	}
	if err != nil {
		return decision{}, e.describe("the decision", e.opts.DecideTimeout, err)
	}
	var d decision
	if err := e.worker.decode(answer, &d); err != nil {
		return decision{}, e.describe("the decision", e.opts.DecideTimeout, err)
	}
	return d, nil
}

const (
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 30 * time.Second
)

// fell takes a worker that is gone out of service: the first time it starts
// again at once, then with growing patience, until an answer succeeds. turn is
// held.
func (e *engine) fell(err error) error {
	if old := e.replace(nil); old != nil {
		old.close()
	}
	e.mu.Lock()
	e.failures++
	e.restarts++
	e.lastErr = err.Error()
	wait := time.Duration(0)
	if e.failures > 1 {
		wait = min(maxBackoff, firstBackoff<<min(e.failures-2, 10))
	}
	e.retryAt = time.Now().Add(wait)
	e.mu.Unlock()
	e.opts.Log.LogAttrs(context.Background(), slog.LevelWarn, "policy worker ended",
		slog.String("engine", e.name), slog.Any("error", err), slog.Duration("backoff", wait))
	return err
}

func (e *engine) settled() {
	if e.worker == nil {
		return
	}
	e.mu.Lock()
	if e.failures > 0 {
		e.failures, e.lastErr, e.retryAt = 0, "", time.Time{}
	}
	e.mu.Unlock()
}

// rest ends a worker that was not used since then, if nobody uses it now.
func (e *engine) rest(since time.Time) {
	select {
	case <-e.turn:
	default:
		return
	}
	defer func() { e.turn <- struct{}{} }()
	e.mu.Lock()
	idle := e.lastUse.Before(since)
	e.mu.Unlock()
	if idle && e.worker != nil {
		e.replace(nil).close()
	}
}

// remove ends it for good.
func (e *engine) remove() {
	<-e.turn
	defer func() { e.turn <- struct{}{} }()
	e.removed = true
	if old := e.replace(nil); old != nil {
		old.close()
	}
}

func (e *engine) status() EngineStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := EngineStatus{
		Engine: e.id, Name: e.name, Revision: e.revision, LoadedAt: e.loadedAt, LastError: e.lastErr,
		Decisions: e.asked, Restarts: e.restarts, RetryAt: e.retryAt,
	}
	if e.live != nil && !e.live.dead() {
		s.PID, s.Sandbox = e.live.pid(), e.live.sandbox
	}
	return s
}

func (a Answer) failed(err error) Answer {
	a.Outcome = Error
	a.Reasons = []Reason{{Text: err.Error(), Kind: ReasonError}}
	return a
}

// set is how one engine's rules become its answer.
func (a *Answer) set(d decision) {
	a.Limits = d.Limits
	plain := func(kind, rule string, texts []string) {
		for _, text := range texts {
			a.Reasons = append(a.Reasons, Reason{Text: text, Rule: rule, Kind: kind})
		}
	}
	switch {
	case d.Error != nil:
		a.Outcome = Error
		a.Limits = Limits{}
		a.Reasons = []Reason{*d.Error}
	case len(d.Deny) > 0:
		a.Outcome = Deny
		plain(ReasonDeny, "deny", d.Deny)
	case !d.Allow && a.Concerned:
		a.Outcome = Deny
		plain(ReasonUndefined, "", []string{"not allowed"})
	case len(d.Ask) > 0:
		a.Outcome = Ask
		plain(ReasonAsk, "ask", d.Ask)
	case !d.Allow:
		a.Outcome = Abstain
	default:
		a.Outcome = Allow
	}
}

// reasonsFor keeps the reasons that led to the outcome, unless all are wanted;
// those that did come first.
func reasonsFor(o Outcome, reasons []Reason, all bool) []Reason {
	decisive := func(kind string) bool {
		switch o {
		case Deny:
			return kind == ReasonDeny || kind == ReasonUndefined
		case Ask:
			return kind == ReasonAsk
		case Allow:
			return kind == ReasonAllow
		}
		return false
	}
	denied := false
	for _, r := range reasons {
		denied = denied || r.Kind == ReasonDeny
	}
	var first, rest []Reason
	for _, r := range reasons {
		switch {
		case decisive(r.Kind) && (!denied || r.Kind != ReasonUndefined):
			first = append(first, r)
		case all:
			rest = append(rest, r)
		}
	}
	return append(first, rest...)
}
