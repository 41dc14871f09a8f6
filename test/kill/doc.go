// Package kill holds the harness that kills the broker: a real broker with
// real shims, virtiofsds and policy workers, whose VMs are a VMM without a
// guest. Several clients grant, revoke, start, stop and name at random; the
// broker is killed at a random moment, at a random failpoint or while it
// starts, and so are shims; it is started again, and what it says and what
// exists is held against a model of what was acknowledged. It has no code but
// its tests.
package kill
