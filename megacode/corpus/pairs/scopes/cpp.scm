; inherits: c_family
[(template_declaration) (for_range_loop) (catch_clause)] @block
(lambda_expression) @function
[(class_specifier) (struct_specifier) (union_specifier)] @class

(namespace_identifier) @word

(reference_declarator (identifier) @var)
(variadic_declarator (identifier) @var)
(structured_binding_declarator (identifier) @var)
(for_range_loop declarator: (identifier) @var)
(optional_parameter_declaration declarator: (identifier) @var)
(lambda_capture_initializer left: (identifier) @var)
(type_parameter_declaration (type_identifier) @var)
(variadic_type_parameter_declaration (type_identifier) @var)
(optional_type_parameter_declaration name: (type_identifier) @var)
(alias_declaration name: (type_identifier) @var)
(class_specifier name: (type_identifier) @name)
(struct_specifier name: (type_identifier) @name)
(union_specifier name: (type_identifier) @name)

(class_specifier name: (type_identifier) @fixed !body)
(struct_specifier name: (type_identifier) @fixed !body)
(union_specifier name: (type_identifier) @fixed !body)
(enum_specifier name: (type_identifier) @fixed)
(qualified_identifier name: (identifier) @keep)
(qualified_identifier name: (type_identifier) @keep)
(qualified_identifier scope: (_) name: (template_type name: (type_identifier) @keep))
(qualified_identifier scope: (_) name: (template_function name: (identifier) @keep))
(using_declaration) @frozen
; In a method a member hides a variable of the function around the class.
(field_declaration declarator: (_) @frozen)
(function_declarator declarator: (field_identifier) @frozen)

; `T x(y);` reads like the declaration of a function. One that can be nothing else keeps its name.
(declaration declarator: (function_declarator (identifier) @fixed (parameter_list . "(" . ")")))
(declaration declarator: (function_declarator (identifier) @fixed (parameter_list [
  (parameter_declaration declarator: (_))
  (parameter_declaration type: [(primitive_type) (sized_type_specifier) (qualified_identifier) (template_type)])
])))
