package policy

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Options configure engines. All but Worker have working zero values.
type Options struct {
	// Worker is the command line that ends in WorkerMain, normally the
	// program's own executable and "policy-worker".
	Worker        []string
	DecideTimeout time.Duration         // per decision; default 100 ms
	LoadTimeout   time.Duration         // start, sandbox and compile; default 10 s
	Idle          time.Duration         // a worker unused so long ends; default 5 min
	Stretch       float64               // multiplies both timeouts on slow machines; default 1
	MemoryMiB     int                   // a worker's memory beyond its own start; default 128
	Name          func(EngineID) string // for people; default the engine's id
	Log           *slog.Logger
}

func (o Options) withDefaults() Options {
	o.DecideTimeout = cmp.Or(o.DecideTimeout, 100*time.Millisecond)
	o.LoadTimeout = cmp.Or(o.LoadTimeout, 10*time.Second)
	o.Idle = cmp.Or(o.Idle, 5*time.Minute)
	o.MemoryMiB = cmp.Or(o.MemoryMiB, 128)
	if o.Stretch > 0 {
		o.DecideTimeout = time.Duration(float64(o.DecideTimeout) * o.Stretch)
		o.LoadTimeout = time.Duration(float64(o.LoadTimeout) * o.Stretch)
		o.Stretch = 0
	}
	if o.Name == nil {
		o.Name = EngineID.String
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

func (o *Options) memory() uint64 { return uint64(o.MemoryMiB) << 20 }

// EngineStatus is what is known of one engine.
type EngineStatus struct {
	Engine    EngineID  `json:"engine"`
	Name      string    `json:"name"`
	Revision  string    `json:"revision"` // in force; empty: none, all is denied
	LoadedAt  time.Time `json:"loaded_at"`
	LastError string    `json:"last_error,omitempty"` // of the newest load, or why the worker ended
	PID       int       `json:"pid,omitempty"`        // of the live worker
	Sandbox   []string  `json:"sandbox,omitempty"`    // what confines the live worker
	Decisions uint64    `json:"decisions"`
	Restarts  uint64    `json:"restarts"` // workers that crashed or were killed
	RetryAt   time.Time `json:"retry_at"` // zero, or the end of the back-off
}

// Engines are the policy engines of the host and of the partitions. All
// methods may be called at once from any goroutine.
type Engines struct {
	opts    Options
	spawner *spawner
	stop    chan struct{}
	janitor sync.WaitGroup

	mu      sync.Mutex // held for a moment only, never across a request
	engines map[EngineID]*engine
	closed  bool
	busy    sync.WaitGroup // Loads and Decides under way
}

var errClosed = errors.New("the policy engines are closed")

// NewEngines starts no worker; one starts when it is first needed.
func NewEngines(opts Options) *Engines {
	e := &Engines{
		opts: opts.withDefaults(), spawner: newSpawner(), stop: make(chan struct{}), engines: map[EngineID]*engine{},
	}
	e.janitor.Go(e.endIdle)
	return e
}

// endIdle ends workers that nobody has asked for a while.
func (e *Engines) endIdle() {
	tick := time.NewTicker(max(e.opts.Idle/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-e.stop:
			return
		case <-tick.C:
			since := time.Now().Add(-e.opts.Idle)
			for _, engine := range e.list() {
				engine.rest(since)
			}
		}
	}
}

func (e *Engines) list() []*engine {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]*engine, 0, len(e.engines))
	for _, engine := range e.engines {
		out = append(out, engine)
	}
	return out
}

// use is the engine of that id, made if it should be, and a claim that keeps
// Close waiting until release is called.
func (e *Engines) use(id EngineID, create bool) (engine *engine, release func(), err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, nil, errClosed
	}
	engine = e.engines[id]
	if engine == nil && create {
		engine = newEngine(id, &e.opts, e.spawner)
		e.engines[id] = engine
	}
	e.busy.Add(1)
	return engine, e.busy.Done, nil
}

// Load compiles a revision in a new worker and puts it in force. When it does
// not compile, the revision in force stays; the error is a *LoadError if the
// sources are at fault, and names the limit if they took too much.
func (e *Engines) Load(ctx context.Context, id EngineID, src Sources) (revision string, err error) {
	engine, release, err := e.use(id, true)
	if err != nil {
		return "", err
	}
	defer release()
	revision = src.Revision()
	if err := src.bounded(); err != nil {
		return "", fmt.Errorf("cannot load the policy of %s: %w", e.opts.Name(id), err)
	}
	if err := engine.load(ctx, src, revision); err != nil {
		return "", err
	}
	return revision, nil
}

// Remove ends an engine; from then on it denies.
func (e *Engines) Remove(id EngineID) {
	e.mu.Lock()
	engine := e.engines[id]
	delete(e.engines, id)
	e.mu.Unlock()
	if engine != nil {
		engine.remove()
	}
}

// Decide asks the engines concerned, all at once, and the host's in any case;
// the host's allow is needed only if it is among ids. in makes the input for
// each; Decide itself sets Partition, and leaves Holder.Own only to the
// holder's own partition. With explain every engine gives all its reasons;
// without, one that refuses or asks says why and where.
func (e *Engines) Decide(ctx context.Context, ids []EngineID, in func(EngineID) Input, explain bool) Verdict {
	hostConcerned := slices.Contains(ids, HostEngine)
	asked := []EngineID{HostEngine}
	for _, id := range ids {
		if !slices.Contains(asked, id) {
			asked = append(asked, id)
		}
	}
	answers := make([]Answer, len(asked))
	var waited []func()
	var others sync.WaitGroup
	for i, id := range asked {
		concerned := !id.Host || hostConcerned
		engine, release, err := e.use(id, false)
		if err != nil || engine == nil {
			if err == nil {
				release()
				err = errors.New("it has no policy in force")
			}
			answers[i] = Answer{Engine: id, Name: e.opts.Name(id), Concerned: concerned}.failed(err)
			continue
		}
		// The host's and one partition's are asked at once, where both are free, and
		// then waited for. Every other one is by a goroutine of its own, so that no
		// partition's turn is held for the sake of another's.
		if len(waited) < 2 {
			if q, ok := engine.begin(in(id).as(id), concerned); ok {
				waited = append(waited, func() { answers[i] = q.answer(explain); release() })
				continue
			}
		}
		others.Go(func() {
			defer release()
			answers[i] = engine.decide(ctx, in(id).as(id), concerned, explain)
		})
	}
	for _, wait := range waited {
		wait()
	}
	others.Wait()
	return Combine(answers)
}

// as is the input as that engine may see it.
func (in Input) as(id EngineID) Input {
	in.Partition = id.String()
	own := HostEngine
	if in.Holder.Partition != nil {
		own = PartitionEngine(*in.Holder.Partition)
	}
	if own != id {
		in.Holder.Own = nil
	}
	return in
}

// marshal writes nil lists and maps as empty ones.
func (in Input) marshal() ([]byte, error) {
	if in.Holder.Ancestors == nil {
		in.Holder.Ancestors = []uuid.UUID{}
	}
	in.Capability = in.Capability.normal()
	if in.Parent != nil {
		parent := in.Parent.normal()
		in.Parent = &parent
	}
	if in.Holder.Own != nil {
		own := *in.Holder.Own
		if own.Names == nil {
			own.Names = []string{}
		}
		if own.Labels == nil {
			own.Labels = map[string]string{}
		}
		in.Holder.Own = &own
	}
	text, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("input: %w", err)
	}
	if len(text) > maxInput {
		return nil, fmt.Errorf("input is %d bytes long, more than %d", len(text), maxInput)
	}
	return text, nil
}

func (c Capability) normal() Capability {
	if c.Rights == nil {
		c.Rights = []string{}
	}
	return c
}

// Bounds of what is sent to a worker.
const (
	maxInput       = 256 << 10
	maxSourceFiles = 256
	maxSourceBytes = 4 << 20 // Rego and data each
)

func (s Sources) bounded() error {
	if len(s.Files) > maxSourceFiles {
		return fmt.Errorf("it has %d files, more than %d", len(s.Files), maxSourceFiles)
	}
	total := 0
	for _, text := range s.Files {
		total += len(text)
	}
	if total > maxSourceBytes || len(s.Data) > maxSourceBytes {
		return fmt.Errorf("it is %d bytes long with %d of data; %d are allowed of each", total, len(s.Data), maxSourceBytes)
	}
	return nil
}

// Revision names the content of sources: a hash over names and texts.
func (s Sources) Revision() string {
	names := make([]string, 0, len(s.Files))
	for name := range s.Files {
		names = append(names, name)
	}
	slices.Sort(names)
	h := sha256.New()
	for _, name := range names {
		fmt.Fprintf(h, "%q %d\n", name, len(s.Files[name]))
		h.Write(s.Files[name])
	}
	fmt.Fprintf(h, "%q %d\n", s.DataName, len(s.Data))
	h.Write(s.Data)
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// Status is sorted: the host first, then by UUID.
func (e *Engines) Status() []EngineStatus {
	var out []EngineStatus
	for _, engine := range e.list() {
		out = append(out, engine.status())
	}
	slices.SortFunc(out, func(a, b EngineStatus) int {
		if a.Engine.Host != b.Engine.Host {
			if a.Engine.Host {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Engine.String(), b.Engine.String())
	})
	return out
}

// Close ends all workers and waits for them; what is under way is waited for
// too, which the deadlines bound.
func (e *Engines) Close() {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return
	}
	e.closed = true
	e.mu.Unlock()
	close(e.stop)
	e.janitor.Wait()
	e.busy.Wait()
	for _, engine := range e.list() {
		engine.remove()
	}
	e.spawner.close()
}
