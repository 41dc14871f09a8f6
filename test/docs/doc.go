// Package docs holds what the pages say against the rest of the tree: a
// relative link leads somewhere, a policy compiles under the rules that
// policies are held to, a VM definition is one that the broker takes, and a
// command line that is shown exists.
package docs
