// Package reconcile decides what must change in the world so that it matches
// the ledger, and carries the changes out.
//
// Its laws:
//
//   - [Objects] and [Plan] are pure: the same grants, observations and instant
//     give the same plan, in the same order, and nothing is touched.
//   - Desired state comes only from live grants. Observed state comes only from
//     the world; what the ledger believes about the world is never consulted.
//   - Withdrawals come before applications in every plan and run in a lane of
//     their own, so that a revocation never waits for a grant, nor, where the
//     ledger alone says that it is due, for a look at the world. Each VM has its
//     own lanes for each kind, so that none waits for another. Each step runs by
//     itself and puts its own end on record, so that no revocation waits for
//     another, or for a guest that does not let go of something else.
//   - What fails pauses its own object and nothing else, is seen while it does,
//     and is over at once when something newer is wanted.
//   - A grant that has ended is revoked when nothing is left that gives it access,
//     also where others keep the object.
//   - Access that has ended is cut even where the ledger cannot be told.
//   - Executors are idempotent: a plan carried out twice, or half, and then
//     again from fresh observations, ends in the same place.
//
// The reconciler is level-triggered: a wake-up says only that something may
// have changed, and a periodic sweep finds what no wake-up announced.
package reconcile
